"""Writing files: who may read them, and what becomes of what a killed writer left."""

import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch

from blip import files
from blip.app.exit import one_line
from blip.app.index import Index, IndexOrigin
from blip.tensors import write_tensors
from blip.train.state import Checkpoints, State
from capfilt.store.storage import Local


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], indirect=True)
def test_all_that_is_written_follows_the_umask(umask, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    tensors = {"a": torch.ones(3)}
    files.write_directory(folder / "model", {"w.safetensors": (lambda path: write_tensors(path, tensors), 9)}, {})
    files.replace_file(folder / "page.html", b"page")
    Local(folder / "run").write("parts/00/a.parquet", b"part")
    Index(folder, folder / "index", IndexOrigin("m", "w", "float32"), [], torch.empty(0, 4)).write()
    Checkpoints(folder / "run", 1).save(torch.nn.Linear(2, 2), {}, State(), {})
    assert len(list(folder.rglob("*.safetensors"))) == 3
    assert modes(folder) == {0o666 & ~umask}
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_dir()} == {0o777 & ~umask}


def denied(name: str):
    def refuse(path, *args, **options):
        if Path(path).name.startswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    real = Path.open
    return refuse


@pytest.mark.parametrize("name", ["index.json", "embeddings"])
def test_an_index_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, name):
    Index(tmp_path, tmp_path / "index", IndexOrigin("m", "w", "float32"), [], torch.empty(0, 4)).write()
    monkeypatch.setattr(Path, "open", denied(name))
    with pytest.raises(PermissionError) as error:
        Index.read(tmp_path, tmp_path / "index")
    monkeypatch.undo()
    message = one_line(error.value)
    assert f"{tmp_path}/index/{name}" in message
    assert "permission denied" in message
    assert "belongs to" in message
    assert "damaged" not in message
    assert "delete" not in message


@pytest.mark.parametrize("name", ["MANIFEST", "optimizer", "state"])
def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch, name):
    checkpoints = Checkpoints(tmp_path, 2)
    path = checkpoints.save(torch.nn.Linear(2, 2), {}, State(), {})
    monkeypatch.setattr(Path, "open", denied(name))
    with pytest.raises(PermissionError):
        checkpoints.newest()
    monkeypatch.undo()
    assert checkpoints.newest()[0] == path


def write(where: Path, how: str) -> None:
    if how == "directory":
        files.write_directory(where / "made", {"a": (lambda path: files.write_bytes(path, b"a"), 1)})
    elif how == "file":
        files.replace_file(where / "made", b"a")
    else:
        Index(where, where / "made", IndexOrigin("m", "w", "float32"), [], torch.empty(0, 4)).write()


def start(where: Path, how: str, moment: str, strike) -> int:
    """A process of its own that writes and is struck at a moment; its number."""

    def event(name, path):
        if name == moment:
            strike()

    if child := os.fork():
        return child
    try:
        files.checkpoint_event = event
        write(where, how)
    finally:
        os._exit(3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = [("directory", "before write"), ("directory", "after write"), ("directory", "before rename"),
           ("file", "before replace"), ("index", "before rename"), ("index", "before replace")]  # fmt: skip


def left(where: Path) -> list[Path]:
    return [path for path in where.rglob("*") if path.name.startswith(".tmp")]


@pytest.mark.parametrize(("how", "moment"), MOMENTS)
def test_what_a_killed_writer_left_is_swept_by_the_next_start(tmp_path, how, moment):
    killed = start(tmp_path, how, moment, die)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    assert left(tmp_path)
    files._sweep_once.cache_clear()  # as a new process
    write(tmp_path, how)
    assert not left(tmp_path)
    assert (tmp_path / "made").exists()


def test_a_live_writers_temporaries_are_left_alone(tmp_path):
    alive = start(tmp_path, "directory", "before rename", signal.pause)
    while not (there := left(tmp_path)):
        time.sleep(0.01)
    files.sweep(tmp_path)
    assert there[0].exists()
    os.kill(alive, signal.SIGKILL)
    os.waitpid(alive, 0)
    files.sweep(tmp_path)
    assert not left(tmp_path)


def test_another_machines_temporaries_and_others_files(tmp_path):
    name = files.partial(tmp_path / "a").name
    _, machine, process, began, end = name.rsplit("-", 4)
    foreign = tmp_path / name.replace(machine, "0" * 8)
    reused = tmp_path / f".tmp-a-{machine}-{process}-{int(began) - 1000}-{end}"
    mine = [tmp_path / other for other in (".tmp-notes", ".tmp-a-123", "a-" + name)]
    for path in (foreign, reused, *mine):
        path.write_bytes(b"x")
    files.sweep(tmp_path)
    assert foreign.exists()  # written a moment ago: its writer may live
    assert not reused.exists()  # the process with this number is another one
    old = time.time() - 7200
    for path in (foreign, *mine):
        os.utime(path, (old, old))
    files.sweep(tmp_path)
    assert not foreign.exists()
    assert all(path.exists() for path in mine)
