"""What the page of `blip demo` can do: the same as the commands on the same files, and nothing that it should not."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from capfilt_crawl import crawl, scored
from PIL import Image
from test_cli import lines, model, photos, png  # noqa: F401

import blip
from blip import installed
from blip.app import cli, demo
from blip.app import loaded as loading
from blip.app.demo import Demo
from blip.app.index import Index, IndexOrigin
from blip.app.loaded import load
from blip.checkpoints import checkpoint
from blip.inference.answering import ANSWERS
from blip.models.vqa import Vqa
from capfilt.report.counts import ReportOptions
from capfilt.report.write import report
from capfilt.select.choose import select
from capfilt.select.policies import SelectConfig

TEXTS = ["a red circle", "two small stars", "a <b>blue</b> moon"]
QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def vqa_model(model, tmp_path_factory) -> str:  # noqa: F811
    """A model for questions with a list of answers."""
    where = tmp_path_factory.mktemp("vqa") / "model"
    loaded, tokenizer = blip.from_pretrained(model)
    checkpoint.save_pretrained(Vqa.from_blip(loaded), tokenizer, where)
    (where / ANSWERS).write_text(json.dumps(["red", "blue", "a circle", "two", "yes", "no"]))
    return str(where)


@pytest.fixture(scope="module")
def capfilt_run(tmp_path_factory) -> str:
    """A scored run with two reports, the selection's written last."""
    folder = tmp_path_factory.mktemp("capfilt")
    run = scored(crawl(folder / "in", shards=2, rows=20) / "*.tar", folder / "a run")
    report(run)
    time.sleep(0.02)
    select(run, "strict", SelectConfig("web-else-syn", itm=0.9))
    report(run, ReportOptions(select="strict", per_group=4))
    return run.where


def answering(model, vqa_model, **more) -> Demo:  # noqa: F811
    vqa = load(vqa_model, "cpu", "auto", Vqa)
    return Demo(load(model, "cpu", "auto"), vqa=vqa, **more)


@pytest.fixture(scope="module")
def desk(model, vqa_model, capfilt_run) -> Demo:  # noqa: F811
    return answering(model, vqa_model, run=capfilt_run)


@pytest.fixture
def run(model, monkeypatch, capfd):  # noqa: F811
    """Run `blip ...` in this process; returns its output."""
    monkeypatch.setenv("OPENBLIP_MODEL", model)

    def run(*args) -> str:
        assert cli.main([*map(str, args)]) == 0
        return capfd.readouterr().out

    return run


# The same as the commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"method": "beam", "num": 3}, {"method": "nucleus", "num": 4, "seed": 7},
    {"method": "nucleus", "num": 2, "top_p": 0.4, "prompt": "a small"},
])  # fmt: skip
def test_captions_are_those_of_the_command(desk, run, photos, options):  # noqa: F811
    args = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    method, num = options.pop("method"), options.pop("num")
    texts = set()
    for path in ("photos/p2.png", "photos/p7.png"):
        captions = desk.caption(path, method, num, **options)
        (printed,) = lines(run("caption", path, "--json", *args))
        assert [text.text for text in captions] == printed["captions"]
        assert [round(text.logprob, 3) for text in captions] == printed["logprob"]
        texts |= set(printed["captions"])
    assert len(texts) > num, "the test needs captions that differ"


def test_another_model_may_write_the_captions(desk, model, photos, tmp_path):  # noqa: F811
    loaded, tokenizer = blip.from_pretrained(model)
    loaded.med.head_bias.data[tokenizer.sep_id] -= 3
    blip.save_pretrained(loaded, tokenizer, tmp_path / "other")
    other = load(str(tmp_path / "other"), "cpu", "auto")
    both = Demo(load(model, "cpu", "auto"), captioner=other)
    assert both.caption("photos/p2.png") != desk.caption("photos/p2.png")
    assert both.caption("photos/p2.png") == Demo(other).caption("photos/p2.png")
    assert both.match("photos/p2.png", TEXTS[0]) == desk.match("photos/p2.png", TEXTS[0])


def test_answers_are_those_of_the_command(desk, run, photos, vqa_model):  # noqa: F811
    answers = desk.answer("photos/p3.png", QUESTION, 4)
    (printed,) = lines(run("vqa", "photos/p3.png", QUESTION, "--model", vqa_model, "--top", 4, "--json"))
    assert [answer.text for answer in answers] == printed["answers"]
    assert [round(answer.probability, 5) for answer in answers] == printed["probability"]


def test_matches_are_those_of_the_command(desk, run, photos):  # noqa: F811
    matches = desk.match("photos/p4.png", "\n".join([" " + TEXTS[0], "", *TEXTS]))
    (printed,) = lines(run("match", "photos/p4.png", *TEXTS, "--json"))
    assert [(text, round(itc, 5), round(itm, 5)) for text, itc, itm in matches] == list(
        zip(printed["texts"], printed["itc"], printed["itm"], strict=True)
    )


def test_where_it_looks_is_told_for_each_word(desk, photos):  # noqa: F811
    ((_, _, chance),) = desk.match("photos/p4.png", TEXTS[0])
    probability, shown = desk.explain_match("photos/p4.png", TEXTS[0])
    assert probability == pytest.approx(chance, abs=1e-6)
    assert [name for name, _ in shown] == ["the image", "the whole text", "red", "circle"]
    assert len({image.tobytes() for _, image in shown}) == 4


def test_the_folder_is_searched_as_by_the_command(model, run, photos):  # noqa: F811
    one = Demo(load(model, "cpu", "auto"))
    one.index = Index(Path("photos"), Path("photos/.blip-index"), IndexOrigin.of(one.matcher, model, "float32"))
    reported = []
    assert one.refresh(lambda done, total: reported.append((done, total))) == (11, 0)
    assert reported[-1] == (11, 11)
    for top in (3, 11):
        hits = one.search(TEXTS[0], top, rerank=4)
        expected = lines(run("search", "photos", TEXTS[0], "--top", top, "--rerank", 4, "--json"))
        assert [f"photos/{hit.name}" for hit in hits] == [line["path"] for line in expected]
        assert [round(hit.score, 5) for hit in hits] == [line["score"] for line in expected]
        assert [round(hit.itc, 5) for hit in hits] == [line["itc"] for line in expected]
        assert [hit.itm and round(hit.itm, 5) for hit in hits] == [line["itm"] for line in expected]
    Path("photos/new.png").write_bytes(png(50))
    Path("photos/bad.png").write_bytes(b"<html>")
    Path("photos/p1.png").unlink()
    reported.clear()
    assert one.refresh(lambda done, total: reported.append((done, total))) == (11, 1)
    assert reported[-1] == (2, 2)
    names = {hit.name for hit in one.search(TEXTS[0], 60)}
    assert "new.png" in names
    assert not {"p1.png", "bad.png"} & names
    Path("photos/new.png").unlink()  # after it was indexed
    assert "new.png" not in {hit.name for hit in one.search(TEXTS[0], 60, rerank=0)}


# A CapFilt run --------------------------------------------------------------------------------------------------------


def test_a_run_is_looked_into(desk, capfilt_run):
    assert desk.reports() == ["strict", "at-half"]
    for name in desk.reports():
        content = desk.report(name)
        assert content == Path(capfilt_run, "report", name, "report.html").read_text()
        assert '<th scope="row">All</th><td class="n">40</td>' in content


@pytest.mark.parametrize("name", ["../../secret", "/etc", "gone", None, "", "strict/../../../secret"])
def test_only_the_runs_own_reports_are_read(desk, capfilt_run, name):
    secret = Path(capfilt_run).parent / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "report.html").write_text("secret")
    with pytest.raises(ValueError, match="no such report") as error:
        desk.report(name)
    assert shlex.split(str(error.value).split("`")[1]) == ["capfilt", "report", str(desk.run)]


def test_a_run_without_reports(model, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(ValueError, match="not the folder of a CapFilt run"):
        Demo(load(model, "cpu", "auto"), run=str(tmp_path))
    (tmp_path / "job.json").write_text("{}")
    one = Demo(load(model, "cpu", "auto"), run=str(tmp_path))
    assert one.reports() == []
    with pytest.raises(ValueError, match="capfilt report"):
        one.report(None)
    folder = tmp_path / "report/x"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<p>")
    assert (one.reports(), one.report("x")) == (["x"], "<p>")
    monkeypatch.setattr(demo, "_REPORT_BYTES", 2)
    with pytest.raises(ValueError, match="too large for this page"):
        one.report("x")


# What does not do -----------------------------------------------------------------------------------------------------


def encoded(size: tuple[int, int], form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("1" if form == "PNG" else "L", size).save(file, form)
    return file.getvalue()


HOSTILE = {
    "an HTML page": (b"<!doctype html><html></html>", "is an HTML page"),
    "nothing": (b"", "empty"),
    "noise": (os.urandom(2000), "not one of JPEG"),
    "half an image": (png(1)[:-40], "cannot be used"),
    "a PSD": (b"8BPS" + bytes(100), "Photoshop"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "XML or SVG"),
    "6 MB": (png(1) + b"\0" * 6_000_000, "more than the limit of 5,242,880"),
    "21 million pixels": (encoded((7000, 3000)), "more than the limit of 20,000,000"),
    "a bomb": (encoded((16, 16)).replace(b"\0\0\0\x10" * 2, b"\0\1\0\0" * 2), "cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_are_no_images_are_told_of(desk, tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "p.png").write_bytes(content)
    start = time.monotonic()
    for use in (desk.caption, lambda path: desk.match(path, "a"), lambda path: desk.answer(path, "a"),
                lambda path: desk.explain_match(path, "a")):  # fmt: skip
        with pytest.raises(ValueError, match="this image cannot be used: ") as stop:
            use(str(tmp_path / "p.png"))
        assert message in str(stop.value)
        assert str(tmp_path) not in str(stop.value)
        assert "\n" not in str(stop.value)
    assert time.monotonic() - start < 10


def test_twenty_million_pixels_are_still_taken(desk, tmp_path):
    (tmp_path / "p.png").write_bytes(encoded((5000, 4000)))
    assert len(desk.match(str(tmp_path / "p.png"), "a star")) == 1


WRONG = {
    "no image": (lambda d, p: d.caption(None), "choose an image first"),
    "too many captions": (lambda d, p: d.caption(p, "nucleus", 11), "captions must be 1 to 10, got 11"),
    "no captions": (lambda d, p: d.caption(p, "nucleus", 0), "captions must be 1 to 10, got 0"),
    "a share above one": (lambda d, p: d.caption(p, "nucleus", 1, top_p=2.0), "top_p must be"),
    "unknown words": (lambda d, p: d.caption(p, prompt="собака"), "the model does not know"),
    "no question": (lambda d, p: d.answer(p, " ! "), "type a question first"),
    "no text": (lambda d, p: d.match(p, " \n \n"), "type a text first"),
    "no words": (lambda d, p: d.match(p, "!!"), "cannot be compared"),
    "too many texts": (lambda d, p: d.match(p, "\n".join(map(str, range(21)))), "compared at once, got 21"),
    "a long text": (lambda d, p: d.match(p, "a" * 2001), "2,001 characters; the limit is 2,000"),
    "a long question": (lambda d, p: d.answer(p, "a" * 2001), "2,001 characters; the limit is 2,000"),
    "nothing to look for": (lambda d, p: d.explain_match(p, " "), "type a text first"),
    "no folder": (lambda d, p: d.search("a"), "--folder DIR"),
    "no folder to refresh": (lambda d, p: d.refresh(), "--folder DIR"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_off_is_said_in_a_line(desk, photos, case):  # noqa: F811
    use, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)) as stop:
        use(desk, "photos/p1.png")
    assert "\n" not in str(stop.value)


def test_without_a_model_for_questions_it_says_how_to_get_one(model, photos):  # noqa: F811
    with pytest.raises(ValueError, match="--vqa DIR"):
        Demo(load(model, "cpu", "auto")).answer("photos/p1.png", QUESTION)
    with pytest.raises(ValueError, match="leave it empty"):
        Demo(load(model, "cpu", "auto"), prompt="собака")


def test_twenty_at_once_are_answered_one_by_one(desk, photos, monkeypatch):  # noqa: F811
    paths = [f"photos/p{i % 11 + 1}.png" for i in range(20)]
    expected = {path: desk.caption(path, "nucleus", 2) for path in set(paths)}
    inside, most, generate_texts = 0, 0, demo.generate_texts
    guard = threading.Lock()

    def watched(*args, **options):
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)
        try:
            time.sleep(0.005)
            return generate_texts(*args, **options)
        finally:
            with guard:
                inside -= 1

    monkeypatch.setattr(demo, "generate_texts", watched)
    with ThreadPoolExecutor(20) as pool:
        captions = list(pool.map(lambda path: desk.caption(path, "nucleus", 2), paths))
    assert captions == [expected[path] for path in paths]
    assert most == 1


# The command ----------------------------------------------------------------------------------------------------------


def refused(capfd, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *map(str, args)])
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_without_gradio_it_says_what_to_install(monkeypatch, capfd, model):  # noqa: F811
    for version, reason in ((None, "it is not installed"), ("6.21.0", "6.21.0 is installed")):
        monkeypatch.setattr(installed, "_version", lambda name, version=version: version)
        stderr = refused(capfd, "--model", model)
        assert reason in stderr
        assert "pip install 'gradio>=6.22'" in stderr
        assert "gradio>=6.22" in stderr


def test_wrong_use_is_one_line(monkeypatch, capfd, model, tmp_path):  # noqa: F811
    import socket

    monkeypatch.setattr(installed, "require", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"cannot listen at 127.0.0.1 port {port}" in refused(capfd, "--model", model, "--port", port)
    assert "cannot listen at 192.0.2.1" in refused(capfd, "--model", model, "--port", 7999, "--host", "192.0.2.1")
    assert "port must be 1 or more, got -1" in refused(capfd, "--port", "-1")
    assert "gone is not a folder" in refused(capfd, "--model", model, "--folder", tmp_path / "gone")
    assert "no images in" in refused(capfd, "--model", model, "--folder", tmp_path)
    assert "--index is of the images to search: give --folder" in refused(capfd, "--model", model, "--index", tmp_path)


def test_every_model_gets_the_tokenizer_that_is_given(monkeypatch, capfd, tmp_path):
    requests = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").touch()

    def load(where, *_, tokenizer=None, **options):
        requests.append((where, tokenizer))
        if len(requests) == 3:
            raise ValueError("enough")

    monkeypatch.setattr(installed, "require", lambda *_: None)
    monkeypatch.setitem(
        sys.modules, "blip.app.demo_page", SimpleNamespace(is_local=None, serve=None)
    )  # it needs Gradio
    monkeypatch.setattr(loading, "load", load)
    refused(capfd, "--model", "a.pth", "--captioner", "b.pth", "--vqa", "c.pth", "--tokenizer", "vocab.txt")
    assert requests == [("a.pth", "vocab.txt"), ("b.pth", "vocab.txt"), ("c.pth", "vocab.txt")]
    assert "did you mean --folder?" in refused(capfd, "--foldr", "photos")


def test_the_help_needs_neither_gradio_nor_torch():
    program = """
import sys
from blip.app import cli
try:
    cli.main(["demo", "--help"])
except SystemExit:
    pass
assert not {"gradio", "torch", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "blip demo --model" in done.stdout
