"""Search in folders that cannot be written: where the index is kept, what is said, and what is not done again."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import model, photos, png  # noqa: F401
from test_search import run  # noqa: F401

import blip
from blip.app import index as index_module
from blip.app.index import Index, cache_place


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/openblip/index"


@pytest.fixture
def lock(monkeypatch):
    """Make folders read-only: what writes there gets the error of a read-only disk, also as root."""
    locked: list[Path] = []

    def guard(owner, name):
        real = getattr(owner, name)

        def guarded(path, *args, **options):
            mode = args[0] if args else options.get("mode", "r")
            writes = name != "open" or set(str(mode)) & set("wax+")
            if writes and any(Path(os.path.realpath(path)).is_relative_to(one) for one in locked):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("open", "touch", "unlink", "mkdir"):
        guard(Path, name)
    for name in ("replace", "mkdir"):
        guard(os, name)
    return lambda *folders: locked.extend(Path(os.path.realpath(folder)) for folder in folders)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the images that are read for an index."""
    names, real = [], index_module.read_images

    def noting(paths, *args):
        names.extend(os.path.basename(path) for path in paths)
        return real(paths, *args)

    monkeypatch.setattr(index_module, "read_images", noting)
    return names


def test_the_index_of_a_read_only_folder_is_in_the_users_cache(run, photos, cache, lock, read):  # noqa: F811
    expected = run("search", "photos", "a star", "--index", "elsewhere")[1]
    read.clear()
    lock(photos)
    status, out, err = run("search", "photos", "a star")
    assert (status, out) == (0, expected)
    assert len(read) == 11
    (place,) = cache.iterdir()
    note, *rest = err.splitlines()
    assert note == f"note: photos/.blip-index cannot be written; the index is in {place}, or give --index DIR"
    assert not [line for line in rest if "note" in line]
    assert sorted(os.listdir(photos)) == sorted(f"p{i}.png" for i in range(1, 12))
    # Again, under another name of the folder.
    read.clear()
    (photos.parent / "other name").symlink_to(photos)
    status, out, _ = run("search", "other name", "a star")
    assert (status, out) == (0, expected.replace("photos/", "other name/"))
    assert read == []


def test_an_index_in_a_read_only_folder_is_used_as_far_as_it_goes(run, photos, cache, lock, read):  # noqa: F811
    assert run("search", "photos")[0] == 0
    before = {path.name: path.read_bytes() for path in (photos / ".blip-index").iterdir()}
    (photos / "p12.png").write_bytes(png(12))
    read.clear()
    lock(photos)
    status, out, err = run("search", "photos", "a star", "--top", 20)
    assert status == 0
    assert len(out.splitlines()) == 12
    assert read == ["p12.png"]
    assert err.count("note: ") == 1
    assert {path.name: path.read_bytes() for path in (photos / ".blip-index").iterdir()} == before
    read.clear()
    assert run("search", "photos", "a star", "--top", 20)[1] == out
    assert read == []


def test_a_complete_index_in_a_read_only_folder_is_used(run, photos, cache, lock):  # noqa: F811
    assert run("search", "photos")[0] == 0
    lock(photos)
    status, _, err = run("search", "photos", "a star")
    assert (status, err) == (0, "")
    assert not cache.exists()


def test_each_model_and_folder_has_its_own(run, photos, model, cache, lock, tmp_path):  # noqa: F811
    other, tokenizer = blip.from_pretrained(model)
    other.image_proj.weight.data.add_(0.1)
    blip.save_pretrained(other, tokenizer, tmp_path / "other")
    assert run("search", "photos")[0] == 0
    lock(photos)
    for _ in range(2):  # the folder's own index is of the first model
        assert run("search", "photos", "a star", "--model", tmp_path / "other")[0] == 0
        assert run("search", "photos", "a star")[0] == 0
        assert len(list(cache.iterdir())) == 1
    (place,) = cache.iterdir()
    (place / "index.json").write_text("[]")
    assert run("search", "photos", "a star", "--model", tmp_path / "other")[0] == 0, "a damaged cache is made again"
    assert Index.read(photos, place) is not None
    assert run("search", "photos", "--rebuild")[0] == 0
    assert len(list(cache.iterdir())) == 2


def test_nothing_is_read_if_no_place_can_be_written(run, photos, cache, lock, read, tmp_path):  # noqa: F811
    lock(photos, cache, tmp_path / "chosen")
    for args in ((), ("--index", tmp_path / "chosen")):
        status, out, err = run("search", "photos", "a star", *args)
        assert (status, out, read) == (2, "", [])
        assert err.count("\n") == 1
        assert "give --index DIR to keep it elsewhere" in err


def test_a_chosen_index_is_never_elsewhere(run, photos, cache, lock, tmp_path):  # noqa: F811
    lock(tmp_path / "chosen")
    status, _, err = run("search", "photos", "a star", "--index", tmp_path / "chosen")
    assert status == 2
    assert f"the index {tmp_path / 'chosen'} cannot be written" in err
    assert not cache.exists()


def test_the_users_cache(tmp_path, monkeypatch, model):  # noqa: F811
    origin = index_module.IndexOrigin("m", "abc", "float32")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by the specification, so ignored
    assert cache_place(tmp_path, origin).is_relative_to(tmp_path / "home/.cache/openblip/index")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a home
    assert cache_place(tmp_path, origin) is None


def test_a_search_that_is_killed_while_it_indexes_goes_on(run, photos, model, cache):  # noqa: F811
    """Killed once some images are saved: the next search has the rest to do and the same answers."""
    program = f"""
import os, signal, sys
from blip import files
from blip.app import cli, index
index._SAVE_SECONDS = 0.0
def event(name, path):
    if name == "before replace" and path.name == "index.json":
        event.count = getattr(event, "count", 0) + 1
        if event.count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
files.checkpoint_event = event
cli.main(["search", "photos", "a star", "--batch", "3", "--model", {model!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(Index.read(Path("photos"), Path("photos/.blip-index")).readable) == 6
    status, out, _ = run("search", "photos", "a star")
    assert (status, out) == (0, run("search", "photos", "a star", "--index", "fresh")[1])
    assert not list(photos.glob(".blip-index/.tmp-*"))
