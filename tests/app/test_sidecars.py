"""Captions beside their images: what is written, kept and refused, what a kill leaves, and the way back."""

import errno
import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tqdm import tqdm

import blip
from blip import files
from blip.app import cli
from blip.app.commands import caption
from blip.data import image_files, transforms  # noqa: F401 - imported before a test forks
from blip.data.image_header import MAX_BYTES
from blip.lock import RunLock
from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.tokenizer import Tokenizer

WORDS = ["a dog", "a red bicycle", "two cats on a bed", "arafed man", "a street at night", "an old boat"]
MODES = ("--skip-existing", "--overwrite", "--append")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (12, 12), random.Random(seed).randbytes(12 * 12 * 3)).save(file, "PNG")
    return file.getvalue()


def words(digest: str, num: int | None = 1) -> list[str]:
    """What the stub says of an image with this SHA-256."""
    at = int(digest, 16)
    return [WORDS[(at + i) % len(WORDS)] + ("" if i == 0 else f" {i}") for i in range(num or 1)]


def stub(chosen, config):
    """Stands for the model: its captions are a function of the bytes, as a model's are."""
    loaded = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(image_size=16))),
        options=lambda where: {"model": "stub", "weights": os.environ.get("WEIGHTS", "w"), "precision": "float32"},
    )

    def describe(read):
        time.sleep(float(os.environ.get("SLEEP", "0")))
        return [[SimpleNamespace(text=text) for text in words(image.digest, config.num)] for image in read]

    return loaded, describe


def refused(chosen, config):
    raise AssertionError("the model was loaded")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """photos/p1.png ... p5.png and photos/sub/q1.png, the working directory above it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption, "_captioner", stub)
    (tmp_path / "photos/sub").mkdir(parents=True)
    for i in range(1, 6):
        (tmp_path / f"photos/p{i}.png").write_bytes(png(i))
    (tmp_path / "photos/sub/q1.png").write_bytes(png(9))
    return Path("photos")


@pytest.fixture
def run(capfd):
    """Run `blip caption ...` in this process; returns status, stdout and the lines of stderr."""

    def run(*args) -> tuple[int, str, list[str]]:
        status = carried_out(*args)
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        return status, output.out, output.err.splitlines()

    return run


def carried_out(*args) -> int:
    try:
        return cli.main(["caption", *map(str, args)])
    except SystemExit as stop:
        return stop.code


def content(folder: Path) -> dict[bytes, bytes]:
    """All files in a folder, without what undo needs; a link as what it leads to."""
    paths = [path for path in folder.rglob("*") if ".blip-undo" not in path.parts]
    texts = {path: path.read_bytes() for path in paths if path.is_file() and not path.is_symlink()}
    texts |= {path: os.fsencode(os.readlink(path)) for path in paths if path.is_symlink()}
    return {os.fsencode(path.relative_to(folder)): text for path, text in texts.items()}


def of(image: Path, num: int = 1) -> list[str]:
    return words(hashlib.sha256(image.read_bytes()).hexdigest(), num)


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2])
def test_captions_are_put_beside_their_images(run, photos, num):
    before = content(photos)
    status, stdout, stderr = run("photos/", "--sidecar", ".txt", "--num", num)
    assert (status, stdout) == (0, "")
    assert stderr[-1] == "6 captioned, 0 kept, 0 could not be used; undo: blip caption photos/ --undo"
    expected = {f"p{i}": of(photos / f"p{i}.png", num) for i in range(1, 6)} | {
        "sub/q1": of(photos / "sub/q1.png", num)
    }
    texts = {
        f"{name}.txt".encode(): "".join(f"{line}\n" for line in lines).encode() for name, lines in expected.items()
    }
    assert content(photos) == before | texts
    assert {path.name for path in photos.iterdir()} - {Path(os.fsdecode(n)).parts[0] for n in before | texts} == {
        ".blip-undo"
    }


def test_captions_are_those_of_the_command_without_side_cars(run, photos, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.load("world")
    torch.manual_seed(3)
    model = Blip(blip.BlipConfig(TINY.vision, tokenizer.text_config(TINY.text), TINY.embed_dim)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "cross" in name else 0.05))
        model.med.head_bias[tokenizer.sep_id] += 4
    blip.save_pretrained(model, tokenizer, tmp_path / "model")
    options = ("--model", tmp_path / "model", "--method", "nucleus", "--max-length", 30)
    _, stdout, _ = run("photos", *options)
    printed = dict(line.split("\t") for line in stdout.splitlines())
    assert len(set(printed.values())) > 3
    status, _, _ = run("photos", *options, "--sidecar", ".caption", "--batch", 2)
    assert status == 0
    assert {str(path.with_suffix(".png")): path.read_text() for path in photos.rglob("*.caption")} == {
        path: f"{text}\n" for path, text in printed.items()
    }


def test_the_words_around_a_caption(run, photos):
    p1, q1 = of(photos / "p1.png")[0], of(photos / "sub/q1.png")[0]
    new = ("--replace", p1, "NEW", "--replace", "NEW", f"new  {p1}", "--replace", q1, q1 + " {stem}")
    run("photos", "--sidecar", ".txt", "--prefix", "sks {stem} ({folder}), ", "--suffix", ", 4k {a|b}", *new)
    assert (photos / "p1.txt").read_text() == f"sks p1 (photos), new {p1}, 4k {{a|b}}\n"
    assert (photos / "sub/q1.txt").read_text() == f"sks q1 (sub), {q1} {{stem}}, 4k {{a|b}}\n"


def test_the_folder_has_a_name_however_it_is_given(run, photos, monkeypatch):
    monkeypatch.chdir(photos)
    run(".", "--sidecar", ".txt", "--prefix", "{folder}: ", "--no-recursive")
    assert Path("p1.txt").read_text() == f"photos: {of(Path('p1.png'))[0]}\n"
    assert not Path("sub/q1.txt").exists()


def test_what_is_there_is_kept_and_the_rest_is_captioned(run, photos, monkeypatch):
    (photos / "p2.txt").write_bytes(b"mine")
    (photos / "p3.txt").write_bytes(b"")
    status, _, stderr = run("photos", "--sidecar", ".txt")
    assert status == 0
    assert stderr[0] == "1 of the captions that are there are empty; --overwrite replaces them"
    assert stderr[-1].startswith("4 captioned, 2 kept, 0 could not be used; undo: ")
    assert (photos / "p2.txt").read_bytes() == b"mine"
    assert (photos / "p3.txt").read_bytes() == b""
    (photos / "p9.png").write_bytes(png(20))
    _, _, stderr = run("photos", "--sidecar", ".txt", "--skip-existing")
    assert stderr[-1].startswith("1 captioned, 6 kept, ")
    before = content(photos)
    monkeypatch.setattr(caption, "_captioner", refused)
    assert run("photos", "--sidecar", ".txt") == (
        0,
        "",
        [stderr[0], "0 captioned, 7 kept, 0 could not be used"],
    ), "there is nothing to undo of a run that did nothing"
    assert content(photos) == before


def test_overwrite_replaces_and_keeps_permissions(run, photos):
    (photos / "p2.txt").write_bytes(b"mine")
    (photos / "p2.txt").chmod(0o640)
    _, _, stderr = run("photos", "--sidecar", ".txt", "--overwrite")
    assert stderr[-1].startswith("6 captioned, 0 kept, ")
    assert (photos / "p2.txt").read_text() == of(photos / "p2.png")[0] + "\n"
    (backup,) = photos.glob(".blip-undo/*/before/*")
    for path in (photos / "p2.txt", backup):
        assert path.stat().st_mode & 0o777 == 0o640
    run("photos", "--undo")
    assert (photos / "p2.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"tag one, tag two", "tag one, tag two; {}\n"),
        (b"tag one\r\n", "tag one; {}\n"),
        (b"\xef\xbb\xbfone\ntwo\n\n", "\ufeffone\ntwo; {}\n"),
        (b"", "{}\n"),
        (b"\xef\xbb\xbf \n", "\ufeff{}\n"),
        ("größe 犬".encode(), "größe 犬; {}\n"),
        (None, "{}\n"),
    ],
)
def test_append_joins_what_is_there(run, photos, before, after):
    if before is not None:
        (photos / "p2.txt").write_bytes(before)
    run("photos", "--sidecar", ".txt", "--append", "--separator", "; ", "--num", 2)
    assert (photos / "p2.txt").read_bytes() == after.format("\n".join(of(photos / "p2.png", 2))).encode()


@pytest.mark.parametrize("text", ["größe".encode("latin-1"), "a dog".encode("utf-16"), "a dog".encode("utf-16-le")])
def test_nothing_is_appended_to_what_is_no_utf_8(run, photos, text):
    (photos / "p2.txt").write_bytes(text)
    status, _, stderr = run("photos", "--sidecar", ".txt", "--append")
    assert status == 1
    assert "photos/p2.png: photos/p2.txt is not UTF-8 text, so nothing is added to it" in stderr
    assert stderr[-1].startswith("5 captioned, 0 kept, 1 could not be used; ")
    assert (photos / "p2.txt").read_bytes() == text


def test_odd_names(run, photos):
    names = [
        "new\nline.png",
        "[x] {stem}.png",
        "größe 犬.PNG",
        os.fsdecode(b"latin\xe9.png"),
        "a.b.png",
        "x" * 251 + ".png",
    ]
    for i, name in enumerate(names):
        (photos / name).write_bytes(png(30 + i))
    status, _, stderr = run("photos", "--sidecar", ".txt", "--prefix", "{stem}: ")
    assert (status, stderr[-1].partition(";")[0]) == (0, "12 captioned, 0 kept, 0 could not be used")
    assert (photos / "new\nline.txt").read_text() == f"new line: {of(photos / names[0])[0]}\n"
    assert (photos / "[x] {stem}.txt").read_text() == f"[x] {{stem}}: {of(photos / names[1])[0]}\n"
    assert (photos / "größe 犬.txt").read_text().startswith("größe 犬: ")
    assert (photos / os.fsdecode(b"latin\xe9.txt")).read_text() == f"latin\ufffd: {of(photos / names[3])[0]}\n"
    assert (photos / "a.b.txt").is_file()
    status, _, stderr = run("photos", "--sidecar", ".caption")
    assert status == 1
    assert stderr[0].endswith(".caption would have more than 255 bytes")
    assert run("photos", "--undo")[2] == ["11 removed, 0 restored, 0 left as they are"]
    assert run("photos", "--undo")[2] == ["12 removed, 0 restored, 0 left as they are"]


def test_images_that_cannot_be_used_get_no_file(run, photos):
    (photos / "broken.png").write_bytes(b"junk")
    (photos / "gone.png").symlink_to("nowhere.png")
    with (photos / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    status, _, stderr = run("photos", "--sidecar", ".txt")
    assert status == 1
    assert sorted(line.partition(":")[0] for line in stderr if line.startswith("photos/")) == [
        "photos/broken.png",
        "photos/gone.png",
        "photos/huge.png",
    ]
    assert stderr[-1].startswith("6 captioned, 0 kept, 3 could not be used; undo: ")
    assert len(list(photos.rglob("*.txt"))) == 6
    status, _, stderr = run("photos", "--sidecar", ".txt")
    assert (status, stderr[-1]) == (1, "0 captioned, 6 kept, 3 could not be used")


def test_an_empty_caption_is_none(run, photos, monkeypatch):
    monkeypatch.setitem(globals(), "WORDS", [""])
    status, _, stderr = run("photos", "--sidecar", ".txt", "--prefix", "sks, ", "--num", 2)
    assert (photos / "p1.txt").read_text() == "sks, 1\n"
    run("photos", "--undo")
    status, _, stderr = run("photos", "--sidecar", ".txt", "--prefix", "sks, ")
    assert status == 1
    assert "photos/p1.png: the model has no words for it" in stderr
    assert stderr[-1] == "0 captioned, 0 kept, 6 could not be used"
    assert not list(photos.rglob("*.txt"))
    assert not (photos / ".blip-undo").exists()


def test_files_and_globs_are_captioned_in_their_own_folders(run, photos, monkeypatch):
    _, _, stderr = run("photos/p1.png", "photos/sub/*.png", "--sidecar", ".txt")
    assert stderr[-1] == "2 captioned, 0 kept, 0 could not be used; undo: blip caption photos photos/sub --undo"
    assert sorted(path.name for path in photos.rglob("*.txt")) == ["p1.txt", "q1.txt"]
    assert run("photos", "photos/sub", "--undo")[2] == ["2 removed, 0 restored, 0 left as they are"]
    monkeypatch.chdir(photos)
    _, _, stderr = run("p1.png", "../photos", "--sidecar", ".txt")
    assert stderr[-1] == "6 captioned, 0 kept, 0 could not be used; undo: blip caption . --undo"
    assert run("p1.png", "--undo")[2] == ["6 removed, 0 restored, 0 left as they are"]


def test_side_cars_are_not_left_out_files(run, photos):
    run("photos", "--sidecar", ".words")
    run("photos", "--sidecar", ".txt", "--sidecar-name", "full", "--metadata")
    (photos / "notes.txt").write_text("about the folder")
    assert image_files.find(["photos"]).left_out == {".txt": 1, ".words": 6, ".jsonl": 1}
    assert image_files.find(["photos"], beside=[".words"]).left_out == {".txt": 1, ".jsonl": 1}
    _, _, stderr = run("photos", "--sidecar", ".words", "--metadata")
    assert stderr[0] == "left out 1 files that are not named like images (.txt)"


def test_hidden_folders_are_not_captioned(run, photos):
    (photos / ".blip-undo/old").mkdir(parents=True)
    (photos / ".blip-undo/old/x.png").write_bytes(png(1))
    _, _, stderr = run("photos", "--sidecar", ".txt")
    assert stderr[-1].startswith("6 captioned")
    assert run("photos", "--undo")[0] == 0
    assert (photos / ".blip-undo/old/x.png").is_file()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sidecar", ".txt", "--overwrite", "--append"], "--overwrite and --append contradict each other"),
        (["--sidecar", ".txt", "--skip-existing", "--append"], "--skip-existing and --append contradict each other"),
        (["--prefix", "x"], "--prefix is about captions beside images"),
        (["--overwrite"], "--overwrite is about captions beside images"),
        (["--replace", "a", "b"], "--replace is about captions beside images"),
        (["--dry-run"], "--dry-run is about captions beside images"),
        (["--sidecar", "txt"], "--sidecar 'txt': give an ending that begins with a dot"),
        (["--sidecar", ""], "--sidecar '': give an ending"),
        (["--sidecar", "."], "--sidecar '.': give an ending"),
        (["--sidecar", "./x"], "--sidecar './x': give an ending"),
        (["--sidecar", ".a\nb"], "--sidecar '.a\\nb': give an ending"),
        (["--sidecar", ".JPG"], "--sidecar .JPG is the ending of an image"),
        (["--sidecar", ".txt", "--prefix", "a\nb"], "--prefix: there is a line break"),
        (["--sidecar", ".txt", "--suffix", "a\r"], "--suffix: there is a line break"),
        (["--sidecar", ".txt", "--replace", "a", "b\n"], "--replace: there is a line break"),
        (["--sidecar", ".txt", "--replace", "", "b"], "--replace '' 'b': give the text to replace"),
        (["--sidecar", ".txt", "--replace", "a"], "argument --replace: expected 2 arguments"),
        (["--sidecar", ".txt", "--prefix", "{name}"], "--prefix: there is no {name}; {stem} and {folder} are replaced"),
        (["--sidecar", ".txt", "--prefix", "caf\udce9"], "--prefix: the text is not UTF-8"),
        (["--sidecar", ".txt", "--out", "a.txt"], "--out and --json are for captions that are not put beside"),
        (["--metadata", "--json"], "--out and --json are for captions that are not put beside"),
        (["--undo", "--sidecar", ".txt"], "--undo takes back the last run"),
        (["--undo", "--append"], "--undo takes back the last run"),
        (["--undo"], "nothing to undo in photos"),
        (["nothere", "--sidecar", ".txt"], "no such file or folder: nothere"),
        (["nothere", "--undo"], "no such file or folder: nothere"),
    ],
)
def test_wrong_use_is_one_line_before_the_model(run, photos, monkeypatch, options, message):
    monkeypatch.setattr(caption, "_captioner", refused)
    before = content(photos)
    status, stdout, stderr = run("photos", *options)
    assert (status, stdout, len(stderr)) == (2, "", 1)
    assert stderr[0].startswith(f"error: {message}")
    assert content(photos) == before
    assert not (photos / ".blip-undo").exists()


def test_images_that_would_share_a_file_are_refused(run, photos, monkeypatch):
    (photos / "p1.jpg").write_bytes(png(40))
    (photos / "sub/q1.gif").write_bytes(png(41))
    monkeypatch.setattr(caption, "_captioner", refused)
    status, _, stderr = run("photos", "--sidecar", ".txt", "--overwrite")
    assert (status, stderr) == (
        2,
        [
            "error: photos/p1.jpg and photos/p1.png would share photos/p1.txt; photos/sub/q1.gif and photos/sub/q1.png "
            "would share photos/sub/q1.txt: --sidecar-name full gives names such as a.jpg.txt"
        ],
    )
    assert not (photos / ".blip-undo").exists()
    monkeypatch.setattr(caption, "_captioner", stub)
    assert run("photos", "--sidecar", ".txt", "--sidecar-name", "full")[0] == 0
    assert (photos / "p1.jpg.txt").read_text() == of(photos / "p1.jpg")[0] + "\n"
    assert (photos / "p1.png.txt").is_file()
    run("photos/p1.jpg", "photos/p2.png", "--sidecar", ".txt")
    assert (photos / "p1.txt").read_text() == of(photos / "p1.jpg")[0] + "\n"


def test_names_that_differ_in_case(run, photos, monkeypatch):
    (photos / "P1.PNG").write_bytes(png(40))
    (photos / "P3.TXT").write_bytes(b"mine")
    status, _, stderr = run("photos", "--sidecar", ".txt")
    assert status == 1
    assert "photos/p3.png: P3.TXT is there, whose name differs from p3.txt only in case: rename it" in stderr
    assert (photos / "P1.txt").read_text() == of(photos / "P1.PNG")[0] + "\n"
    assert (photos / "p1.txt").read_text() == of(photos / "p1.png")[0] + "\n"
    assert not (photos / "p3.txt").exists()
    # Where case does not count, both would be one file.
    real = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path, **how: real(str(path).replace("P1.PNG", "p1.png"), **how))
    status, _, stderr = run("photos", "--sidecar", ".caption")
    assert status == 2
    assert "photos/P1.PNG and photos/p1.png would share photos/P1.caption" in stderr[0]


def test_no_image_is_replaced_by_a_caption(run, photos):
    (photos / "p1.txt").write_bytes(png(50))  # an image with an odd name
    status, _, stderr = run("photos/p1.png", "photos/p1.txt", "--sidecar", ".txt", "--overwrite")
    assert status == 2
    assert "would share photos/p1.txt" in stderr[0] or "would replace photos/p1.txt" in stderr[0]
    assert (photos / "p1.txt").read_bytes() == png(50)
    (photos / "metadata.png").write_bytes(png(51))
    status, _, stderr = run("photos", "--sidecar", ".jsonl", "--metadata")
    assert (status, stderr) == (
        2,
        ["error: the captions of photos/metadata.png would replace photos/metadata.jsonl: give another --sidecar"],
    )


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_written_through_links(run, photos, tmp_path, mode):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "there.txt").write_text("precious")
    (outside / "o1.png").write_bytes(png(60))
    (photos / "p1.txt").symlink_to(outside / "there.txt")
    (photos / "p2.txt").symlink_to("nowhere.txt")
    (photos / "linked").symlink_to(outside)
    (photos / "link.png").symlink_to(outside / "o1.png")
    before = content(outside)
    status, _, stderr = run("photos", "--sidecar", ".txt", mode)
    assert status == 1
    assert content(outside) == before, "and no log nor lock either"
    reasons = dict(line.split(": ", 1) for line in stderr if line.startswith("photos/"))
    assert reasons.pop("photos/p2.png") == "photos/p2.txt is a link, and nothing is written through links"
    assert reasons.pop("photos/linked/o1.png") == (
        "photos/linked leads outside photos, and nothing is written through links: caption it by itself"
    )
    if mode != "--skip-existing":
        assert reasons.pop("photos/p1.png").startswith("photos/p1.txt is a link")
    assert reasons == {}
    assert (photos / "link.txt").read_text() == of(outside / "o1.png")[0] + "\n"
    assert (photos / "p1.txt").is_symlink()
    status, _, stderr = run("photos/linked", "--sidecar", ".txt")
    assert status == 0
    assert (outside / "o1.txt").is_file()


def test_folders_and_pipes_that_are_named_like_side_cars(run, photos):
    (photos / "p1.txt").mkdir()
    os.mkfifo(photos / "p2.txt")
    status, _, stderr = run("photos", "--sidecar", ".txt", "--append")
    assert status == 1
    assert "photos/p1.png: photos/p1.txt is a folder" in stderr
    assert "photos/p2.png: photos/p2.txt is not a regular file" in stderr
    assert stderr[-1].startswith("4 captioned, 0 kept, 2 could not be used")


@pytest.mark.parametrize("closed", ["photos", "photos/sub"])
def test_a_folder_that_cannot_be_written_to(run, photos, monkeypatch, closed):
    monkeypatch.setattr(caption, "_captioner", refused)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and (path != closed or mode == os.R_OK))
    before = content(photos)
    status, _, stderr = run("photos", "--sidecar", ".txt")
    assert (status, len(stderr)) == (2, 1)
    assert stderr[0].startswith(f"error: {closed} cannot be written to, so no captions can be put there: ")
    assert content(photos) == before
    assert not (photos / ".blip-undo").exists()


@pytest.mark.parametrize("at", ["photos", "photos/sub", "."])
def test_two_commands_at_once_do_not_interleave(run, photos, monkeypatch, at):
    """A run in the folder, in one inside it, or in one above it."""
    code = (
        "import sys, pathlib\nfrom blip.lock import RunLock\n"
        "with RunLock(pathlib.Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-P", "-c", code, f"{at}/.blip-undo"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        monkeypatch.setattr(caption, "_captioner", refused)
        status, _, stderr = run("photos", "--sidecar", ".txt")
        assert (status, len(stderr)) == (2, 1)
        assert stderr[0].startswith("error: another command is writing captions into ")
        assert f"process {other.pid}" in stderr[0]
        other.stdin.close()
    monkeypatch.setattr(caption, "_captioner", stub)
    assert run("photos", "--sidecar", ".txt")[0] == 0


def test_commands_in_neighbouring_folders_do_not_stop_each_other(run, photos, tmp_path):
    (tmp_path / ".blip-undo").mkdir()
    (tmp_path / ".blip-undo/run.lock").write_bytes(b"")
    (tmp_path / "more").mkdir()
    with RunLock(tmp_path / "more/.blip-undo"):
        assert run("photos", "--sidecar", ".txt")[0] == 0


def test_dry_run_says_what_would_be_done(run, photos, monkeypatch):
    monkeypatch.setattr(caption, "_captioner", refused)
    (photos / "p1.txt").write_text("mine")
    (photos / "p2.txt").mkdir()
    before = content(photos)
    for mode, action in [("--skip-existing", "keep"), ("--overwrite", "replace"), ("--append", "append")]:
        status, stdout, stderr = run("photos", "--sidecar", ".txt", "--dry-run", mode)
        assert status == 1
        assert stdout.splitlines() == [
            f"photos/p1.png\t{action}\tphotos/p1.txt",
            "photos/p2.png\tnone: photos/p2.txt is a folder\tphotos/p2.txt",
            *(f"photos/p{i}.png\tcreate\tphotos/p{i}.txt" for i in (3, 4, 5)),
            "photos/sub/q1.png\tcreate\tphotos/sub/q1.txt",
        ]
        to_do, kept = (4, 1) if mode == "--skip-existing" else (5, 0)
        assert stderr[-1] == f"{to_do} to caption, {kept} to keep, 1 that cannot be used; nothing was written"
    assert content(photos) == before
    assert not (photos / ".blip-undo").exists()


# metadata.jsonl -------------------------------------------------------------------------------------------------------


def rows(photos: Path) -> list[dict]:
    return [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]


def test_metadata_is_in_natural_order(run, photos):
    (photos / "p10.png").write_bytes(png(70))
    (photos / "größe.png").write_bytes(png(71))
    status, _, stderr = run("photos", "--metadata", "--num", 2, "--suffix", "!")
    assert status == 0
    names = ["größe.png", *(f"p{i}.png" for i in (1, 2, 3, 4, 5, 10)), "sub/q1.png"]
    assert rows(photos) == [{"file_name": name, "text": f"{t}!"} for name in names for t in of(photos / name, 2)]
    assert "größe" in (photos / "metadata.jsonl").read_text(encoding="utf-8")
    assert not list(photos.rglob("*.txt"))
    assert stderr[-1] == "8 captioned, 0 kept, 0 could not be used; undo: blip caption photos --undo"
    assert run("photos", "--metadata")[2][-1] == "0 captioned, 8 kept, 0 could not be used"
    assert run("photos", "--undo")[0] == 0
    assert not (photos / "metadata.jsonl").exists()


def test_metadata_is_read_by_others(run, photos):
    run("photos", "--metadata")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir="photos", split="train", cache_dir="cache")
    assert list(loaded["text"]) == [row["text"] for row in rows(photos)]


OTHER = [
    '{"file_name": "video.mp4", "text": "a film",  "n": 1e3}',
    '{"file_name": "p3.png", "licence": "by", "text": "three"}',
    '{"file_name": "./p2.png", "licence": "sa", "text": null}',
    '{"file_name": "p3.png", "licence": "nc", "text": "drei"}',
]


@pytest.mark.parametrize("mode", MODES)
def test_other_rows_and_columns_stay(run, photos, mode):
    (photos / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(OTHER))
    before = content(photos)
    status, _, stderr = run("photos", "--metadata", mode)
    assert status == 0
    kept = 1 if mode == "--skip-existing" else 0
    assert stderr[-1].startswith(f"{6 - kept} captioned, {kept} kept, ")
    p3 = of(photos / "p3.png")[0]
    three = {
        "--skip-existing": [{"licence": "by", "text": "three"}, {"licence": "nc", "text": "drei"}],
        "--overwrite": [{"licence": "by", "text": p3}],
        "--append": [{"licence": "by", "text": "three"}, {"licence": "nc", "text": f"drei, {p3}"}],
    }[mode]
    assert rows(photos) == [
        {"file_name": "p1.png", "text": of(photos / "p1.png")[0]},
        {"file_name": "./p2.png", "licence": "sa", "text": of(photos / "p2.png")[0]},
        *({"file_name": "p3.png", **row} for row in three),
        *({"file_name": f"p{i}.png", "text": of(photos / f"p{i}.png")[0]} for i in (4, 5)),
        {"file_name": "sub/q1.png", "text": of(photos / "sub/q1.png")[0]},
        json.loads(OTHER[0]),
    ]
    assert OTHER[0] in (photos / "metadata.jsonl").read_text(), "as it was, to the byte"
    run("photos", "--undo")
    assert content(photos) == before


def test_metadata_has_the_texts_of_the_side_cars(run, photos):
    (photos / "p1.txt").write_text("mine\n\nand mine\n")
    (photos / "p2.txt").write_bytes("größe".encode("latin-1"))
    (photos / "p3.txt").write_bytes(b"")
    before = content(photos)
    status, _, stderr = run("photos", "--metadata", "--sidecar", ".txt")
    assert status == 1
    assert "photos/p2.png: photos/p2.txt is not UTF-8 text, so it is not in metadata.jsonl" in stderr
    assert stderr[-1].startswith("3 captioned, 2 kept, 1 could not be used; undo: ")
    assert [(row["file_name"], row["text"]) for row in rows(photos)] == [
        ("p1.png", "mine"),
        ("p1.png", "and mine"),
        *((name, of(photos / name)[0]) for name in ("p4.png", "p5.png", "sub/q1.png")),
    ]
    (photos / "p4.txt").write_text("edited\n")
    status, _, stderr = run("photos", "--metadata", "--sidecar", ".txt")
    assert rows(photos)[2] == {"file_name": "p4.png", "text": "edited"}
    assert run("photos", "--undo")[2] == ["0 removed, 1 restored, 0 left as they are"]
    (photos / "p4.txt").write_text(of(photos / "p4.png")[0] + "\n")
    assert run("photos", "--undo")[2] == ["4 removed, 0 restored, 0 left as they are"]
    assert content(photos) == before


def test_a_name_that_json_cannot_hold_is_named(run, photos):
    (photos / os.fsdecode(b"latin\xe9.png")).write_bytes(png(80))
    status, _, stderr = run("photos", "--metadata")
    assert status == 1
    assert any("its name is not UTF-8, so metadata.jsonl cannot hold it" in line for line in stderr)
    assert stderr[-1].startswith("6 captioned, 0 kept, 1 could not be used")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.jsonl",
            b'{"file_name": "p1.png"}\n[1]\n',
            'line 2 of photos/metadata.jsonl is not {"file_name": ...}',
        ),
        ("metadata.jsonl", b'{"image": "p1.png"}\n', "line 1 of photos/metadata.jsonl is not"),
        (
            "metadata.jsonl",
            b'{"file_name": "p1.png", "text": ["a"]}\n',
            "line 1 of photos/metadata.jsonl: `text` is not",
        ),
        ("metadata.jsonl", b"\xff\n", "photos/metadata.jsonl is not UTF-8 text"),
        ("metadata.jsonl", None, "photos/metadata.jsonl is not a regular file"),
        ("metadata.csv", b"file_name,text\n", "readers would ignore photos/metadata.csv beside a metadata.jsonl"),
    ],
)
def test_a_file_of_another_kind_is_refused(run, photos, monkeypatch, name, text, message):
    monkeypatch.setattr(caption, "_captioner", refused)
    if text is None:
        (photos / name).symlink_to("elsewhere.jsonl")
    else:
        (photos / name).write_bytes(text)
    before = content(photos)
    status, _, stderr = run("photos", "--metadata")
    assert (status, len(stderr)) == (2, 1)
    assert stderr[0].startswith(f"error: {message}")
    assert content(photos) == before
    assert not (photos / ".blip-undo").exists()


# The way back ---------------------------------------------------------------------------------------------------------


def test_each_run_is_taken_back(run, photos):
    (photos / "p1.txt").write_bytes(b"\xff mine\r\n")
    states = [content(photos)]
    run("photos", "--sidecar", ".txt")
    states.append(content(photos))
    run("photos", "--sidecar", ".txt", "--append", "--prefix", "x ", "--sidecar-name", "full", "--metadata")
    states.append(content(photos))
    run("photos", "--sidecar", ".txt", "--overwrite", "--prefix", "y ")
    assert len({json.dumps(sorted(map(repr, state.items()))) for state in states}) == 3
    for state, line in zip(
        states[::-1], ["0 removed, 6 restored, 0", "7 removed, 0 restored, 0", "5 removed, 0 restored, 0"], strict=True
    ):
        status, stdout, stderr = run("photos", "--undo")
        assert (status, stdout, stderr) == (0, "", [f"{line} left as they are"])
        assert content(photos) == state
    assert not (photos / ".blip-undo").exists()
    status, _, stderr = run("photos", "--undo")
    assert (status, stderr) == (2, ["error: nothing to undo in photos: no run of `blip caption` is recorded there"])


@pytest.mark.parametrize("options", [["--sidecar", ".txt"], ["--metadata"]])
def test_the_run_of_a_folder_above_is_named_with_its_command(run, photos, tmp_path, options):
    above = tmp_path / "all my [photos]"
    (above / "sub/deep").mkdir(parents=True)
    (above / "empty").mkdir()
    shutil.copy(photos / "p1.png", above / "sub/deep")
    run("all my [photos]", *options)
    before = content(above)
    problem = "error: nothing to undo in {}: no run of `blip caption` is recorded there"
    for folder in ("all my [photos]/sub", "all my [photos]/sub/deep", above / "sub"):
        where = above if folder == above / "sub" else "all my [photos]"
        command = shlex.join(["blip", "caption", str(where), "--undo"])
        reason = f". Its captions are of a run in {where}; to take back all of that: {command}"
        assert run(folder, "--undo") == (2, "", [problem.format(folder) + reason])
    assert run("all my [photos]/empty", "--undo") == (2, "", [problem.format("all my [photos]/empty")])
    assert content(above) == before
    assert run(*shlex.split(command)[2:])[0] == 0
    assert [path.name for path in above.rglob("*") if path.is_file()] == ["p1.png"]


def test_what_was_edited_since_is_left_and_named(run, photos):
    (photos / "p1.txt").write_bytes(b"mine")
    (photos / "p4.txt").write_bytes(b"four")
    run("photos", "--sidecar", ".txt", "--overwrite")
    (photos / "p1.txt").write_bytes(b"edited")
    (photos / "p2.txt").write_bytes(b"edited, too")
    (photos / "p4.txt").unlink()
    (photos / "p5.txt").unlink()
    (photos / "p5.txt").symlink_to("p1.txt")
    for removed in (2, 0):
        status, _, stderr = run("photos", "--undo")
        assert status == 1
        assert stderr[:4] == [
            "photos/p1.txt was edited since, and is left as it is",
            "photos/p2.txt was edited since, and is left as it is",
            "photos/p4.txt was removed since, and is left as it is",
            "photos/p5.txt was edited since, and is left as it is",
        ]
        assert stderr[4].startswith("what was there before is in photos/.blip-undo/0001-")
        assert stderr[5] == f"{removed} removed, 0 restored, 4 left as they are"
    assert (photos / "p1.txt").read_bytes() == b"edited"
    assert not (photos / "p3.txt").exists()
    kept = {path.read_bytes() for path in photos.glob(".blip-undo/*/before/*")}
    assert kept == {b"mine", b"four"}


def test_undo_says_what_it_would_do(run, photos):
    (photos / "p1.txt").write_bytes(b"mine")
    run("photos", "--sidecar", ".txt", "--overwrite")
    (photos / "p2.txt").write_bytes(b"edited")
    before = content(photos)
    status, stdout, stderr = run("photos", "--undo", "--dry-run")
    assert status == 1
    assert stdout.splitlines()[:2] == ["photos/p1.txt\twould be restored", "photos/p3.txt\twould be removed"]
    assert stderr[-1] == "4 removed, 1 restored, 1 left as they are; nothing was changed"
    assert content(photos) == before


@pytest.mark.parametrize(
    "line",
    [
        '{"path": "../precious.txt", "action": "created", "before": null, "after": "DIGEST"}',
        '{"path": "/precious.txt", "action": "created", "before": null, "after": "DIGEST"}',
        '{"path": "linked/precious.txt", "action": "created", "before": null, "after": "DIGEST"}',
        '{"path": "p1.txt", "action": "replaced", "before": "../../../precious.txt", "after": "DIGEST"}',
        '{"path": "p1.txt"}',
        "[]",
        "no json",
    ],
)
def test_a_log_that_came_with_a_folder_reaches_nothing_outside(run, photos, tmp_path, line):
    (tmp_path / "precious.txt").write_bytes(b"precious")
    (photos / "linked").symlink_to(tmp_path)
    run("photos/p1.png", "--sidecar", ".txt")
    (log,) = photos.glob(".blip-undo/*/log.jsonl")
    log.write_text(log.read_text() + line.replace("DIGEST", hashlib.sha256(b"precious").hexdigest()) + "\n")
    before = content(photos)
    status, _, stderr = run("photos", "--undo")
    assert (status, len(stderr)) == (2, 1)
    assert stderr[0].startswith(f"error: line 2 of {log} is not a change of a file in photos, so nothing is done")
    assert content(photos) == before
    assert (tmp_path / "precious.txt").read_bytes() == b"precious"


def test_a_backup_that_is_damaged_is_not_restored(run, photos):
    (photos / "p1.txt").write_bytes(b"mine")
    run("photos", "--sidecar", ".txt", "--overwrite")
    (backup,) = photos.glob(".blip-undo/*/before/*")
    backup.write_bytes(b"other")
    status, _, stderr = run("photos", "--undo")
    assert status == 1
    assert stderr[0].startswith(f"photos/p1.txt cannot be restored, as {backup} is missing or damaged")
    assert (photos / "p1.txt").read_text() == of(photos / "p1.png")[0] + "\n"


# What is stopped and continued ----------------------------------------------------------------------------------------


def forked(*args) -> int:
    """Run `blip caption` in a child, by whose signal or status it ends."""
    child = os.fork()
    if not child:
        tqdm.set_lock(threading.RLock())  # its own, as one that is shared stays locked when this process is killed
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        status = 99
        try:
            status = carried_out(*args)
        finally:
            os._exit(status)
    return child


def crashes(monkeypatch, at: int) -> None:
    """Kill the process at its `at`-th rename."""
    seen = [0]

    def event(name: str, path: Path) -> None:
        seen[0] += 1
        if seen[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(files, "checkpoint_event", event)


def there_before(photos: Path) -> None:
    (photos / "p1.txt").write_bytes(b"mine")
    (photos / "p3.txt").write_bytes(b"my own\r\n")
    (photos / "sub/q1.txt").write_bytes(b"")
    (photos / "metadata.jsonl").write_text("\n".join(OTHER) + "\n")


@pytest.mark.parametrize("kind", [["--metadata"], ["--sidecar", ".txt", "--metadata"]])
@pytest.mark.parametrize("mode", MODES)
def test_a_kill_at_each_rename_changes_nothing_in_the_end(run, photos, tmp_path, monkeypatch, mode, kind):
    there_before(photos)
    before = content(photos)
    options = [*kind, mode, "--batch", 2]
    finished = run("photos", *options)
    after = content(photos)
    assert run("photos", "--undo")[0] == 0
    assert content(photos) == before
    killed = 0
    for at in range(1, 99):
        with monkeypatch.context() as patch:
            crashes(patch, at)
            ended = os.waitpid(forked("photos", *options), 0)[1]
        if ended == 0:
            break
        assert ended == signal.SIGKILL
        killed += 1
        if at % 2:
            status, _, stderr = run("photos", *options)
            assert status == 0
            assert stderr[-1] == finished[2][-1], "counted as if it had not been killed"
            assert content(photos) == after
        if at % 2 or ((photos / ".blip-undo").is_dir() and list(photos.glob(".blip-undo/[0-9]*"))):
            assert run("photos", "--undo")[0] == 0
        assert content(photos) == before
    assert killed > 3


def test_a_kill_during_undo_changes_nothing_in_the_end(run, photos, monkeypatch):
    there_before(photos)
    before = content(photos)
    for at in range(1, 99):
        run("photos", "--sidecar", ".txt", "--overwrite")
        with monkeypatch.context() as patch:
            crashes(patch, at)
            ended = os.waitpid(forked("photos", "--undo"), 0)[1]
        if ended == 0:
            break
        assert run("photos", "--undo")[0] == 0
        assert content(photos) == before
        assert not (photos / ".blip-undo").exists()
    assert at > 2


def test_another_command_is_another_run(run, photos, monkeypatch):
    (photos / "p1.txt").write_bytes(b"mine")
    before = content(photos)
    with monkeypatch.context() as patch:
        crashes(patch, 8)
        assert os.waitpid(forked("photos", "--sidecar", ".txt", "--append", "--batch", 2), 0)[1] == signal.SIGKILL
    between = content(photos)
    p1 = of(photos / "p1.png")[0]
    assert between[b"p1.txt"] == f"mine, {p1}\n".encode()
    run("photos", "--sidecar", ".txt", "--append", "--prefix", "sks ")
    assert (photos / "p1.txt").read_text() == f"mine, {p1}, sks {p1}\n"
    run("photos", "--undo")
    assert {k: v for k, v in content(photos).items() if b".tmp-" not in k} == {
        k: v for k, v in between.items() if b".tmp-" not in k
    }
    monkeypatch.setenv("WEIGHTS", "others")
    run("photos", "--sidecar", ".txt", "--append")
    assert (photos / "p1.txt").read_text() == f"mine, {p1}, {p1}\n"
    run("photos", "--undo")
    monkeypatch.delenv("WEIGHTS")
    run("photos", "--sidecar", ".txt", "--append")
    assert (photos / "p1.txt").read_text() == f"mine, {p1}\n"
    run("photos", "--sidecar", ".txt", "--append")
    assert (photos / "p1.txt").read_text() == f"mine, {p1}, {p1}\n", "the run had finished"
    run("photos", "--undo")
    run("photos", "--undo")
    assert content(photos) == before


def test_what_is_edited_while_a_run_is_stopped_is_left(run, photos, monkeypatch):
    with monkeypatch.context() as patch:
        crashes(patch, 6)
        os.waitpid(forked("photos", "--sidecar", ".txt", "--overwrite", "--batch", 2), 0)
    (photos / "p1.txt").write_text("edited")
    status, _, stderr = run("photos", "--sidecar", ".txt", "--overwrite")
    assert status == 0
    assert "photos/p1.txt was edited since the run was stopped, and is left as it is" in stderr
    assert stderr[-1].startswith("5 captioned, 1 kept, ")
    assert (photos / "p1.txt").read_text() == "edited"


def test_a_key_press_leaves_all_whole(run, photos, monkeypatch):
    def interrupted(chosen, config):
        loaded, describe = stub(chosen, config)
        batches = []

        def stops(read):
            batches.append(read)
            if len(batches) == 3:
                raise KeyboardInterrupt
            return describe(read)

        return loaded, stops

    monkeypatch.setattr(caption, "_captioner", interrupted)
    status, _, stderr = run("photos", "--sidecar", ".txt", "--batch", 2)
    assert status == 130
    assert stderr[-1] == ("stopped after 4 of 6 images; the same command continues; undo: blip caption photos --undo")
    assert sorted(path.name for path in photos.rglob("*.txt")) == ["p1.txt", "p2.txt", "p3.txt", "p4.txt"]
    monkeypatch.setattr(caption, "_captioner", stub)
    assert run("photos", "--sidecar", ".txt")[2][-1].startswith("6 captioned, 0 kept, ")
    assert run("photos", "--undo")[2] == ["6 removed, 0 restored, 0 left as they are"]


@pytest.mark.parametrize("at", range(1, 9))
def test_a_full_disk_is_one_line_and_the_same_command_continues(run, photos, monkeypatch, at):
    there_before(photos)
    before = content(photos)
    options = ("photos", "--sidecar", ".txt", "--append", "--batch", 2)
    run(*options)
    after = content(photos)
    run("photos", "--undo")
    real, count = files.write_bytes, [0]

    def full(path, content):
        count[0] += 1
        if count[0] >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        status, _, stderr = run(*options)
    assert status == 2
    assert stderr[-1].startswith("error: could not write photos/")
    assert "Free some space or " in stderr[-1]
    assert not list(photos.rglob(".tmp-*"))
    assert run(*options)[0] == 0
    assert content(photos) == after
    run("photos", "--undo")
    assert content(photos) == before


def test_the_end_of_a_torn_log_is_dropped(run, photos, monkeypatch):
    with monkeypatch.context() as patch:
        crashes(patch, 6)
        os.waitpid(forked("photos", "--sidecar", ".txt", "--overwrite", "--batch", 2), 0)
    (log,) = photos.glob(".blip-undo/*/log.jsonl")
    with log.open("a") as file:
        file.write('{"path": "p5')
    assert run("photos", "--sidecar", ".txt", "--overwrite")[0] == 0
    assert run("photos", "--undo")[2] == ["6 removed, 0 restored, 0 left as they are"]


def test_an_undo_that_is_killed_at_its_very_end_leaves_nothing_behind(run, photos, monkeypatch):
    before = content(photos)
    run("photos", "--sidecar", ".txt")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        child = forked("photos", "--undo")
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert content(photos) == before
    assert (photos / ".blip-undo").exists()
    status, _, stderr = run("photos", "--undo")
    assert status == 2
    assert stderr[-1].startswith("error: nothing to undo in photos")
    assert not (photos / ".blip-undo").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["--sidecar", ".txt"], ["--metadata"], ["--sidecar", ".caption", "--metadata"]])
@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_mixed_images_killed_ten_times(run, tmp_path, monkeypatch, mode, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption, "_captioner", stub)
    monkeypatch.setenv("SLEEP", "0.02")
    mixed(tmp_path / "photos", tmp_path / "elsewhere")
    photos, options = Path("photos"), [*kind, mode, "--batch", 8, "--num", 2, "--prefix", "{stem}, "]
    before = content(photos)
    started = time.monotonic()
    status, _, expected = run("photos", *options)
    seconds = time.monotonic() - started
    assert status == 1
    after = content(photos)
    assert len(after) > len(before) + (100 if "--sidecar" in kind else -1)
    assert run("photos", "--undo")[0] == 0
    assert content(photos) == before
    chance, killed = random.Random(f"{mode}{kind}"), 0
    for _ in range(200):
        child = forked("photos", *options)
        time.sleep(chance.uniform(0, seconds / 4))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == signal.SIGKILL:
            killed += 1
        else:  # it came to its end before, and the same command would begin another run
            run("photos", "--undo")
        if killed == 10:
            break
    assert killed == 10
    status, _, stderr = run("photos", *options)
    assert status == 1
    assert content(photos) == after
    assert stderr[-1] == expected[-1]
    child = forked("photos", "--undo")
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run("photos", "--undo")
    assert content(photos) == before
    assert not (photos / ".blip-undo").exists()


def save(image: Image.Image, path: Path, form: str) -> None:
    if form == "HEIF":
        pytest.importorskip("pillow_heif").from_pillow(image).save(path)
    else:
        image.save(path, form)


def mixed(folder: Path, outside: Path) -> None:
    """200 images in several folders and formats, linked and broken ones, some with captions."""
    chance = random.Random(5)
    outside.mkdir()
    kinds = [("JPEG", "jpg", "RGB"), ("PNG", "png", "RGBA"), ("JPEG", "jpeg", "CMYK"), ("WEBP", "webp", "RGB")]
    kinds += [("PNG", "PNG", "P"), ("GIF", "gif", "P"), ("BMP", "bmp", "RGB"), ("JPEG", "JPG", "L")]
    kinds += [("HEIF", "heic", "RGB"), ("AVIF", "avif", "RGBA"), ("TIFF", "tiff", "CMYK"), ("TIFF", "tif", "1")]
    rows = []
    for i in range(200):
        at = folder / ["", "sub", "sub/[deep] ü", "10_dog"][i % 4]
        at.mkdir(parents=True, exist_ok=True)
        form, suffix, mode = kinds[i % len(kinds)]
        path = at / f"image {i}.{suffix}"
        image = Image.frombytes("RGB", (24, 16), chance.randbytes(24 * 16 * 3)).convert(mode)
        if i % 25 == 3:
            path.write_bytes(chance.randbytes(99))
        elif i % 25 == 4:
            save(image, outside / path.name, form)
            path.symlink_to(outside / path.name)
        elif i % 25 == 5:
            path.symlink_to(outside / "nothing.jpg")
        elif i % 25 == 6:
            save(image, path, form)
            path.write_bytes(path.read_bytes()[:60])
        else:
            save(image, path, form)
        if i % 7 == 0:
            path.with_suffix([".txt", ".caption"][i % 2]).write_text(f"caption of {i}\n")
        if i % 11 == 0:
            rows.append({"file_name": str(path.relative_to(folder)), "n": i, **({"text": f"row {i}"} if i % 2 else {})})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
