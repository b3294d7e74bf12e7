"""The `blip` command: what it answers, and what it says when something is off."""

import dataclasses
import io
import json
import os
import random
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

import blip
from blip.app import cli
from blip.app.commands import caption
from blip.data import image_files
from blip.data.formats.tars import IMAGES
from blip.data.images import UnreadableImage, decode
from blip.data.transforms import EvalTransform
from blip.inference import generate
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS
from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.tokenizer import Tokenizer

DRAWN = ["--method", "nucleus", "--num", "3", "--max-length", "30", "--json"]


def png(seed: int, level: int = 6) -> bytes:
    """Coloured noise; `level` changes the bytes and not the pixels."""
    pixels = random.Random(seed).randbytes(12 * 12 * 3)
    file = io.BytesIO()
    Image.frombytes("RGB", (12, 12), pixels).save(file, "PNG", compress_level=level)
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a model that has something else to say of every image, and sometimes comes to an end."""
    tokenizer = Tokenizer.load("world")
    torch.manual_seed(3)
    model = Blip(blip.BlipConfig(TINY.vision, tokenizer.text_config(TINY.text), TINY.embed_dim)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "cross" in name else 0.05))
        model.med.head_bias[tokenizer.sep_id] += 4
    folder = tmp_path_factory.mktemp("model") / "model"
    blip.save_pretrained(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A folder with p1.png ... p11.png, the working directory above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(1, 12):
        (tmp_path / f"photos/p{i}.png").write_bytes(png(i))
    return tmp_path / "photos"


@pytest.fixture
def run(model, monkeypatch, capfd):
    """Run `blip caption ...` in this process; returns status, output and what was said on stderr."""
    monkeypatch.setenv("OPENBLIP_MODEL", model)

    def run(*args: str) -> tuple[int, str, str]:
        try:
            status = cli.main(["caption", *map(str, args)])
        except SystemExit as stop:
            status = stop.code
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        return status, output.out, output.err

    return run


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def by_name(out: str) -> dict[str, list[str]]:
    return {Path(line["path"]).name: line["captions"] for line in lines(out)}


# Answers


def test_captions_are_those_of_the_library(run, photos, model):
    status, out, err = run("photos")
    assert (status, err) == (0, "11/11 images  " + err.partition("  ")[2])
    names, captions = zip(*(line.split("\t") for line in out.splitlines()), strict=True)
    assert list(names) == [f"photos/p{i}.png" for i in range(1, 12)]
    assert len(set(captions)) > 5, "the test needs captions that depend on their images"
    loaded, tokenizer = blip.from_pretrained(model)
    for name, printed in zip(names, captions, strict=True):
        images = EvalTransform(64)(Image.open(name).convert("RGB"))[None]
        ((text,),) = generate.generate_texts(
            loaded, tokenizer, images, DECODE_PRESETS["caption_2022"], prompt=CAPTION_PROMPT
        )
        assert printed == text.text


def test_several_captions_as_text_and_as_json(run, photos):
    status, out, _ = run("photos/p3.png", "photos/p2.png", "--num", 2)
    assert status == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [f"photos/p{i}.png" for i in (2, 2, 3, 3)]
    _, stdout, _ = run("photos/p3.png", "photos/p2.png", "--num", 2, "--json")
    records = lines(stdout)
    assert [f"{line['path']}\t{text}" for line in records for text in line["captions"]] == out.splitlines()
    for line in records:
        assert list(line) == ["path", "captions", "logprob", "finished"]
        assert [len(values) for values in list(line.values())[1:]] == [2, 2, 2]
        assert all(value < 0 for value in line["logprob"])
        assert all(isinstance(value, bool) for value in line["finished"])


@pytest.mark.parametrize("options", [DRAWN, ["--json"], ["--method", "greedy", "--json", "--prompt", "a small"]])
def test_a_caption_does_not_depend_on_what_is_beside_it(run, photos, monkeypatch, options):
    expected = by_name(run("photos", *options)[1])
    assert len(expected) == 11
    assert len({tuple(texts) for texts in expected.values()}) > 5
    for batch in (1, 4, 11):
        assert by_name(run("photos", *options, "--batch", batch)[1]) == expected
    monkeypatch.chdir(photos)
    assert by_name(run("p7.png", *options)[1]) == {"p7.png": expected["p7.png"]}
    (photos / "another name").write_bytes((photos / "p7.png").read_bytes())
    assert by_name(run("another name", "p1.png", *options)[1])["another name"] == expected["p7.png"]


def test_what_is_drawn_is_a_function_of_bytes_and_seed(run, photos):
    (photos / "same.png").write_bytes(png(1, level=0))
    texts = by_name(run("photos", *DRAWN)[1])
    assert texts["same.png"] != texts["p1.png"], "the same pixels in other bytes are another file"
    likeliest = by_name(run("photos", "--json")[1])
    assert likeliest["same.png"] == likeliest["p1.png"]
    other = by_name(run("photos", *DRAWN, "--seed", 1)[1])
    assert all(other[name] != texts[name] for name in texts)
    assert len({text for three in texts.values() for text in three}) > 25, "samples must differ"


def chosen(**given):
    return caption.CaptionOptions(images=["a.png"], **given).decoding()


def test_options_change_the_preset():
    assert chosen() == DECODE_PRESETS["caption_2022"]
    assert chosen(preset="capfilt_2022", seed=5, num=2).top_k == 50
    assert chosen(length_rule="generated") == dataclasses.replace(
        DECODE_PRESETS["caption_2022"], length_rule="generated"
    )
    greedy = chosen(method="greedy", min_length=0)
    assert (greedy.method, greedy.beams, greedy.num, greedy.min_length) == ("beam", 1, 1, 0)
    assert (chosen(num=5).beams, chosen(num=2).beams, chosen(num=2, beams=7).beams) == (5, 3, 7)
    drawn = chosen(method="nucleus", num=40, top_p=0.5, max_length=9)
    assert (drawn.method, drawn.num, drawn.top_p, drawn.max_length) == ("nucleus", 40, 0.5, 9)


def test_answers_go_into_a_file(run, photos, tmp_path):
    _, expected, _ = run("photos")
    status, out, _ = run("photos", "--out", tmp_path / "new.txt")
    assert (status, out) == (0, "")
    assert (tmp_path / "new.txt").read_text() == expected


FORMS = {"text": ["--num", "2"], "json": ["--num", "2", "--json"]}
"""Two lines or one about an image."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", ["between images", "within a line", "within an image", "zeros"])
def test_a_killed_run_goes_on_and_leaves_the_file_of_one_that_was_not(run, photos, monkeypatch, form, cut):
    run("photos", "--out", "whole", *FORMS[form])
    whole = Path("whole").read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    each = len(ends) // 11
    at = {"between images": ends[4 * each - 1], "within a line": ends[4 * each] - 3, "within an image": ends[4 * each]}
    Path("whole").write_bytes(whole[: at.get(cut, ends[4 * each] - 3)] + bytes(4096) * (cut == "zeros"))
    seen = []
    monkeypatch.setattr(image_files, "_read_one", watching(seen, image_files._read_one))
    status, out, err = run("photos", "--out", "whole", "--batch", 3, *FORMS[form])
    assert (status, out) == (0, "")
    done = 5 if (form, cut) == ("json", "within an image") else 4
    assert f"already has the answers about {done} images: {11 - done} left" in err
    assert len(seen) == 11 - done
    assert Path("whole").read_bytes() == whole
    # Once more, and there is nothing to do.
    status, out, err = run("photos", "--out", "whole", *FORMS[form])
    assert (status, out) == (0, "")
    assert "nothing to do" in err
    assert len(seen) == 11 - done
    assert Path("whole").read_bytes() == whole


def watching(seen: list, function):
    def watched(path, *args):
        seen.append(path)
        return function(path, *args)

    return watched


def test_new_images_are_added_and_what_failed_is_tried_again(run, photos):
    (photos / "p12.png").write_bytes(b"")
    assert run("photos", "--out", "out")[0] == 1
    before = Path("out").read_text()
    (photos / "p12.png").write_bytes(png(12))
    (photos / "p13.png").write_bytes(png(13))
    status, _, err = run("photos", "--out", "out")
    assert status == 0
    assert "11 images: 2 left" in err
    after = Path("out").read_text()
    assert after.startswith(before)
    assert [line.split("\t")[0] for line in after.splitlines()] == [f"photos/p{i}.png" for i in range(1, 14)]


OTHERS = {
    "a photograph": (png(1), "is not an answer"),
    "a program": (b"import os\n\nprint(os.sep)\n", "is not an answer"),
    "a line without an end": (b"remember the milk", "is not an answer"),
    "a table": (b"name\tcaption\nphotos/p1.png\ta dog\n", "--out"),
    "answers without a record": (b"photos/p1.png\ta dog\n", "options.json"),
    "JSON lines of another": (b'{"image": "photos/p1.png", "caption": "a dog"}\n', "is not an answer"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_not_ours_is_never_written_over(run, photos, what, more, recorded):
    content, message = OTHERS[what]
    if recorded:  # answers were here once, and something else is now
        run("photos", "--out", "mine", *more)
        if what in ("a table", "answers without a record") and not more:
            return
    Path("mine").write_bytes(content)
    status, out, err = run("photos", "--out", "mine", *more)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert "--out" in err
    assert recorded or more or message in err
    assert Path("mine").read_bytes() == content


def test_an_out_that_a_glob_made_an_image_is_refused(run, photos):
    before = (photos / "p1.png").read_bytes()
    status, _, err = run("--out", "photos/p1.png", "photos/p2.png", "photos/p3.png")
    assert status == 2
    assert "named like an image" in err
    assert (photos / "p1.png").read_bytes() == before
    assert run("photos/p2.png", "--out", "photos/new.JPG")[0] == 2
    assert not (photos / "new.JPG").exists()


@pytest.mark.parametrize("more", [["--num", "2"], ["--json"], ["--prompt", ""], ["--model", "other"], ["--seed", "1"]])
def test_answers_of_other_options_are_refused_by_name(run, photos, model, more):
    if more[0] == "--model":
        other, tokenizer = blip.from_pretrained(model)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        blip.save_pretrained(other, tokenizer, "other")
    run("photos", "--out", "out")
    before = Path("out").read_bytes()
    status, _, err = run("photos", "--out", "out", *more)
    assert status == 2
    assert "give another --out" in err
    assert more[0] == "--json" or {"--model": "weights"}.get(more[0], more[0][2:]) in err
    assert Path("out").read_bytes() == before
    Path("out").unlink()
    assert run("photos", "--out", "out", *more)[0] == 0


def test_answers_go_into_pipes_and_devices(run, photos):
    for _ in range(2):
        assert run("photos", "--out", "/dev/null")[:2] == (0, "")


def test_a_kill_loses_the_last_batch_at_most(photos, model):
    """A real one, in the middle of the work."""
    command = [sys.executable, "-m", "blip", "caption", "photos", "--model", model, "--out", "out", "--batch", "1"]
    slow = "import time, blip.inference.generate as g, blip.app.cli, sys; w = g.generate_texts\n"
    slow += "g.generate_texts = lambda *a, **k: (time.sleep(0.2), w(*a, **k))[1]\n"
    slow += f"sys.exit(blip.app.cli.main({command[3:]!r}))"
    started = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.DEVNULL)
    while not Path("out").exists() or Path("out").read_text().count("\n") < 3:
        assert started.poll() is None
        time.sleep(0.02)
    started.kill()
    started.wait()
    kept = Path("out").read_text()
    assert 3 <= kept.count("\n") < 11
    assert cli.main(command[3:]) == 0
    torn = kept[: kept.rfind("\n") + 1]
    assert Path("out").read_text().startswith(torn)
    assert Path("out").read_text().count("\n") == 11


def test_answers_appear_as_they_are_made(run, photos, tmp_path, monkeypatch):
    seen, generate_texts = [], generate.generate_texts

    def watched(*args, **options):
        path = tmp_path / "out.txt"
        seen.append(path.read_text().count("\n") if path.exists() else None)
        return generate_texts(*args, **options)

    monkeypatch.setattr(generate, "generate_texts", watched)
    run("photos", "--out", tmp_path / "out.txt", "--batch", 4)
    assert seen == [None, 0, 4, 8]


# Which images


def test_files_folders_and_globs_are_taken_once_in_natural_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a10.png", "a9.JPG", "a/x2.webp", "a/b/x1.bmp", "A11.gif", "a-b.jpeg", "[odd].png", "notes"]
    hidden = [".hidden.png", "._a9.JPG", ".git/a.png"]
    others = ["notes.txt", "a/table.CSV", "b.psd", "a10.txt", "a9.JPG.txt", "A11.caption"]  # side-cars, the last three
    for name in names + hidden + others:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("a/loop").symlink_to(tmp_path)
    inputs = image_files.find(["."])
    assert [path.removeprefix("./") for path in inputs.paths] == [
        "[odd].png", "a/b/x1.bmp", "a/x2.webp", "a9.JPG", "a10.png", "A11.gif", "a-b.jpeg",
    ]  # fmt: skip
    assert inputs.left_out == {"no ending": 1, ".txt": 1, ".csv": 1, ".psd": 1}
    assert image_files.find(["a10.png", "a*.JPG", "./a10.png", "a9.JPG"]).paths == ["a9.JPG", "a10.png"]
    assert image_files.find(["[odd].png", "notes"]).paths == ["[odd].png", "notes"]
    Path("a/loop").unlink()  # a glob follows links
    assert image_files.find(["**/x*"]).paths == ["a/b/x1.bmp", "a/x2.webp"]
    assert image_files.find(["[a]"]).paths == ["a/b/x1.bmp", "a/x2.webp"]


def test_reading_ahead_is_in_order_and_bounded(tmp_path):
    paths = []
    for i in range(60):
        paths.append(str(tmp_path / f"{i}.png"))
        Path(paths[-1]).write_bytes(png(i) if i % 7 else b"")
    Image.new("RGB", (640, 480)).save(paths[1], "JPEG")
    begun = []
    ahead = image_files.read_images(paths, lambda image: begun.append(image.size) or torch.zeros(3, 4, 4), 4)
    assert not begun
    first = next(ahead)
    assert [one.path for one in first] == paths[:4]
    assert len(begun) <= 2 * 4 + 8, "one batch is out, one and what the threads hold may be made"
    assert (640, 480) in begun, "whole, as in evaluation"
    rest = list(ahead)
    assert [one.path for batch in (first, *rest) for one in batch] == paths
    assert [len(batch) for batch in rest] == [4] * 14
    unread = [one for batch in (first, *rest) for one in batch if one.reason]
    assert [one.path for one in unread] == paths[::7]
    assert {one.reason for one in unread} == {"is empty (0 bytes)"}


# What is off


def test_images_that_cannot_be_read_are_listed_and_the_others_answered(run, photos):
    expected = by_name(run("photos", *DRAWN)[1])
    (photos / "p5.jpg").write_bytes(b"<html>404</html>")
    (photos / "p0.gif").write_bytes(b"")
    (photos / "gone.png").symlink_to(photos / "nowhere")
    os.mkfifo(photos / "pipe.png")
    (photos / "table.txt").touch()
    status, out, err = run("photos", *DRAWN, "--batch", 4)
    assert status == 1
    assert by_name(out) == expected
    messages = err.splitlines()
    assert messages[0] == "left out 1 files that are not named like images (.txt)"
    assert [line for line in messages if line.startswith("photos/")] == [
        "photos/gone.png: no such file",
        "photos/p0.gif: is empty (0 bytes)",
        "photos/p5.jpg: is an HTML page, not an image: the download failed",
        "photos/pipe.png: not a regular file",
    ]
    assert messages[-1] == "4 of 15 images could not be used"


def test_no_image_at_all_can_be_read(run, photos):
    (photos / "p1.png").write_bytes(b"x")
    assert run("photos/p1.png")[:2] == (1, "")


LONG = "a small " * 40
WRONG = {
    "no such file": (["photos", "nowhere.png"], "no such file or folder: nowhere.png"),
    "an address": (["https://x/y.png"], "download"),
    "an empty folder": (["empty"], "no images in empty: looked for names ending in avif, bmp, gif, heic, "),
    "an empty glob": (["photos/*.jpg"], "nothing matches photos/*.jpg"),
    "a glob of empty folders": (["em*"], "no images in em*: looked for"),
    "nothing": ([], "IMAGE"),
    "no model there": (["photos", "--model", "./nowhere"], "./nowhere is not a model directory"),
    "not a model": (["photos", "--model", "photos"], "photos has no config.json"),
    "a file for a model": (["photos", "--model", "photos/p1.png"], "is not a model directory"),
    "another program's model": (["photos", "--model", "foreign"], "model.safetensors is cut short to nothing"),
    "a long prompt": (["photos", "--prompt", LONG], "a prompt of 65 tokens exceeds the model's 64 positions"),
    "a prompt that leaves nothing": (["photos", "--max-length", "4", "--min-length", "0"], "leaves no room up to"),
    "a prompt of unknown words": (["photos", "--prompt", "собака"], "does not know"),
    "too many tokens": (["photos", "--max-length", "65"], "the model's 64 positions"),
    "least above most": (
        ["photos", "--min-length", "9", "--max-length", "8"],
        "min_length 9 is more than max_length 8",
    ),
    "several greedy ones": (["photos", "--method", "greedy", "--num", "3"], "--num is 3"),
    "more than beams": (["photos", "--num", "3", "--beams", "2"], "num 3 is more than the 2 beams"),
    "a share of beams": (["photos", "--top-p", "0.5"], "--top-p is of nucleus sampling, not of beam search"),
    "beams of a sample": (["photos", "--method", "nucleus", "--beams", "2"], "--beams is of beam search"),
    "beams of a preset that samples": (["photos", "--preset", "nucleus", "--beams", "2"], "--beams is of beam search"),
    "greedy beams": (["photos", "--method", "greedy", "--beams", "2"], "--method greedy has one beam"),
    "no captions": (["photos", "--num", "0"], "num must be 1 or more, got 0"),
    "a share above one": (["photos", "--method", "nucleus", "--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
    "no batch": (["photos", "--batch", "0"], "batch must be 1 or more, got 0"),
    "a word for a number": (["photos", "--seed", "x"], "--seed"),
    "an unknown method": (["photos", "--method", "bean"], "'bean'"),
    "an unknown option": (["photos", "--nmu", "3"], "there is no option --nmu; did you mean --num?"),
    "an abbreviated option": (["photos", "--max", "9"], "there is no option --max; did you mean --max-length?"),
    "no such device": (["photos", "--device", "toaster"], "device toaster cannot be used here"),
    "float16 on a CPU": (["photos", "--device", "cpu", "--precision", "float16"], "float16 needs a GPU"),
    "a folder for a file": (["photos", "--out", "photos"], "'photos'"),
    "no folder for the file": (["photos", "--out", "no/where"], "'no/where'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_changes_nothing(run, photos, case):
    Path("empty/.git").mkdir(parents=True)
    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"model_type": "blip"}')
    Path("foreign/model.safetensors").touch()
    Path("old").write_text("old")
    args, message = WRONG[case]
    status, out, err = run(*args, *([] if "--out" in args else ["--out", "old"]))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert Path("old").read_text() == "old"


def test_without_a_model_it_says_what_to_do(run, photos, monkeypatch):
    monkeypatch.delenv("OPENBLIP_MODEL")
    status, _, err = run("photos")
    assert status == 2
    assert "--model DIR" in err
    assert "OPENBLIP_MODEL" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["captoin"], ["--verbose"]])
def test_no_command(args, capfd):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_closed_standard_output_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 2
    assert capfd.readouterr().err == "error: standard output is closed; redirect it to /dev/null\n"


def failing(monkeypatch, after: int, error: BaseException):
    """From the call `after` on the model fails."""
    calls, generate_texts = [], generate.generate_texts

    def failing(*args, **options):
        calls.append(0)
        if len(calls) > after:
            raise error
        return generate_texts(*args, **options)

    monkeypatch.setattr(generate, "generate_texts", failing)


def test_a_key_press_stops_it_and_keeps_what_is_there(run, photos, monkeypatch):
    failing(monkeypatch, 3, KeyboardInterrupt())
    status, out, err = run("photos", "--batch", 2)
    assert status == 130
    assert out.count("\n") == 4
    assert err.splitlines()[-1] == "stopped after 4 of 11 images"


def test_out_of_memory_names_the_remedy(run, photos, monkeypatch):
    failing(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"))
    status, _, err = run("photos")
    assert status == 2
    assert "--batch" in err.splitlines()[-1]


def test_a_full_disk_is_named(run, photos):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    status, _, err = run("photos", "--out", "/dev/full")
    assert status == 2
    assert err.startswith("error: /dev/full could not be written")


def test_a_reader_that_has_enough_ends_it_quietly(run, photos, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run("photos") == (141, "", "")


def test_odd_names_stay_one_line(run, photos):
    odd = os.fsencode(photos) + b"/tab\tline\nesc\x1b[31m \xff.png"
    with open(odd, "wb") as file:
        file.write(png(1))
    status, out, _ = run(photos / "p1.png", os.fsdecode(odd))
    assert status == 0
    names = [line.split("\t")[0] for line in out.encode(errors="surrogateescape").decode(errors="replace").splitlines()]
    assert names[1] == f"{photos}/tab\\tline\\nesc\\x1b[31m \ufffd.png"
    _, out, _ = run(photos / "p1.png", os.fsdecode(odd), "--json")
    assert lines(out)[1]["path"] == os.fsdecode(odd)


# Progress and help


def test_progress_is_told_in_lines_where_there_is_no_terminal(run, photos, monkeypatch):
    monkeypatch.setattr("blip.app.answers._SECONDS", 0)
    _, _, err = run("photos", "--batch", 4)
    reports = [line.split() for line in err.splitlines()]
    assert [words[0] for words in reports] == ["4/11", "8/11", "11/11"]
    for words in reports:
        assert words[1:2] + words[3:5] + words[6:] == ["images", "a", "second", "left"]
        assert float(words[2]) > 0
    assert run("photos/p1.png", "photos/p2.png")[2] == "", "two images need no progress"


def test_on_a_terminal_there_is_a_bar_and_the_answers_are_as_ever(run, photos, monkeypatch):
    expected = run("photos")[1]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, out, err = run("photos", "--batch", 4)
    assert out == expected
    assert "11/11" in err
    assert "images/s]" in err


def test_help_is_quick_and_has_examples():
    program = """
import contextlib, io, sys
from blip.app import cli
for args in ([], *([name] for name in sys.argv[1:])):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*args, "--help"])
    assert (f"\\n  blip {args[0]} " if args else "\\nList the options of one with") in said.getvalue(), said.getvalue()
heavy = {"torch", "numpy", "PIL", "transformers", "tqdm", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program, *cli.COMMANDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_script_is_installed():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="blip")
    assert script.load() is cli.command


# Real images


def test_real_photographs(run, real_data):
    options = ["--method", "nucleus", "--json"]
    status, out, err = run(real_data / "photos", *options, "--batch", 32)
    assert status == 0
    assert err.startswith("left out 2 files that are not named like images (.json)\n")
    captions = by_name(out)
    assert len(captions) == 236
    some = sorted(captions)[::40]
    again = by_name(run(*(real_data / "photos/images" / name for name in reversed(some)), *options, "--batch", 2)[1])
    assert again == {name: captions[name] for name in some}


def test_real_broken_images(run, real_data):
    folder = real_data / "broken_images"
    paths = [path for path in folder.iterdir() if path.suffix[1:].lower() in IMAGES]
    refused = {}
    for path in paths:
        try:
            decode(path, 100_000_000)
        except UnreadableImage as error:
            refused[str(path)] = error.reason
    status, out, err = run(folder, "--json")
    assert status == 1
    reasons = dict(line.split(": ", 1) for line in err.splitlines() if line.startswith(str(folder)))
    assert reasons == refused
    assert {line["path"] for line in lines(out)} == {str(path) for path in paths} - refused.keys()
    assert err.splitlines()[-1] == f"{len(refused)} of {len(paths)} images could not be used"


def test_the_literal_name_of_a_folder_is_no_glob(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[2024] {a,b}/1.jpg", "[2024] {a,b}/2.jpg", "2/3.jpg", "{x,y}.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    both = ["[2024] {a,b}/1.jpg", "[2024] {a,b}/2.jpg"]
    assert image_files.find(["[2024] {a,b}/*.jpg"]).paths == image_files.find(["[2024] {a,b}/{2,1}.jpg"]).paths == both
    assert image_files.find(["{x,y}.jpg", "[2]/*"]).paths == ["2/3.jpg", "{x,y}.jpg"]
    url = f"file://{tmp_path}/%5B2024%5D%20%7Ba,b%7D"
    assert image_files.find([url, f"{url}/1.jpg"]).paths == [f"{tmp_path}/{name}" for name in both]


LEAVING = """
import atexit, ctypes, threading, time
from blip.app.exit import leave
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # as a library of C++ does whose thread still runs when it is unloaded
atexit.register(print, "done at the end")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread was waited for"))).start()
def main():
    {body}
leave(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library by its name")
@pytest.mark.parametrize(
    ("body", "status", "printed"),
    [
        ("return 4", 4, ""),
        ("return None", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why"),
        ("raise KeyError('key')", 1, "KeyError: 'key'"),
    ],
)
def test_a_library_that_aborts_at_the_end_changes_no_status(body, status, printed):
    done = subprocess.run([sys.executable, "-c", LEAVING.format(body=body)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "a thread was waited for\ndone at the end\n")
    assert printed in done.stderr


def test_the_programs_end_so():
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name for name, target in scripts.items() if target.endswith(":command")} == {"blip", "capfilt", "blip-eval"}
