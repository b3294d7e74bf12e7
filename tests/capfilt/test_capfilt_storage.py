"""An object store in place of a folder: memory that fails, is busy, and lists late."""

import io
import uuid

import fsspec
import pytest
from capfilt_crawl import HERE, annotations, crawl, make_fake, planned, scored
from fsspec.implementations.memory import MemoryFileSystem

from capfilt.export import export
from capfilt.reading import Reader
from capfilt.run import Run
from capfilt.score.loop import score
from capfilt.select.choose import select
from capfilt.select.policies import SelectConfig
from capfilt.store import storage
from capfilt.store.storage import Remote, StorageError, open_storage
from capfilt.verify import verify


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return scored(crawl(folder / "in"), folder / "run")


def test_a_run_in_an_object_store(base, url, tmp_path):
    run = scored(base.job["root"], url)
    assert annotations(run).equals(annotations(base))
    select(run, "half", SelectConfig())
    account = export(run, "half", "wds", f"{url}/out")
    select(base, "half", SelectConfig())
    assert account["files"] == export(base, "half", "wds", str(tmp_path / "out"))["files"]
    assert verify(url).status() == 0
    assert open_storage(url).listing("nothing") == {}


def test_shards_in_an_object_store(base, url):
    files = fsspec.filesystem("memory")
    for s in range(3):
        with open(f"{base.job['root']}/{s:05d}.tar", "rb") as file:
            files.pipe_file(f"{url.removeprefix('memory:/')}/in/{s:05d}.tar", file.read())
    run = scored(f"{url}/in/*.tar", f"{url}/run")
    table, wanted = annotations(run), annotations(base)
    assert table.equals(wanted)  # ids as well: a crawl may be copied to a store
    files.pipe_file(f"{url.removeprefix('memory:/')}/in/00001.tar", b"\0" * 1024)
    again = Run.open(f"{url}/run")
    for part in again.plan[:5]:
        again.storage.remove(f"parts/{part.pid[:2]}/{part.pid}.parquet")
    out = io.StringIO()
    assert score(again, make_fake, HERE, out) == 3
    assert "source_changed" in out.getvalue()


def test_neighbours_in_a_remote_shard_are_one_request(base, url, monkeypatch):
    """Ten billion images with a text and a JSON member each would be thirty billion requests."""
    files = fsspec.filesystem("memory")
    inside = f"{url.removeprefix('memory:/')}/in/00000.tar"
    with open(f"{base.job['root']}/00000.tar", "rb") as file:
        files.pipe_file(inside, file.read())
    run, ranges, cat_file = planned(f"{url}/in/*.tar", f"{url}/run"), [], MemoryFileSystem.cat_file

    def counted(self, path, start=None, end=None, **how):
        if path.endswith(".tar"):
            ranges.append((start, end))
        return cat_file(self, path, start, end, **how)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    assert len(ranges) == len(run.plan) == 3  # of 16, 16 and 8 samples, as they are decoded
    assert annotations(run).equals(annotations(base).slice(0, 40))
    monkeypatch.setattr("capfilt.reading._REQUEST", 1)  # none together
    ranges.clear()
    (source,) = run.sources.values()
    rows = list(Reader(source, run.reading, run.storage).read(0, 40))
    assert len(ranges) == 3 * len(rows) == 120
    monkeypatch.setattr("capfilt.reading._REQUEST", 5000)  # some
    ranges.clear()
    assert [row.image for row in Reader(source, run.reading, run.storage).read(0, 40)] == [row.image for row in rows]
    assert 5 < len(ranges) < 60
    assert all(stop - start <= 5000 for start, stop in ranges)


@pytest.mark.parametrize("fault", ["first put fails", "busy now and then", "lists late"])
def test_a_store_with_faults(base, url, monkeypatch, fault):
    """Fault 16."""
    run = planned(base.job["root"], url)
    calls = {"n": 0}
    put, find = MemoryFileSystem._open, MemoryFileSystem.find

    def open_(self, path, mode="rb", **more):
        calls["n"] += 1
        if "w" in mode and (calls["n"] == 1 if fault == "first put fails" else fault[0] == "b" and calls["n"] % 5 < 2):
            raise OSError("503 Slow Down")
        return put(self, path, mode, **more)

    def late(self, path, **more):
        paths = find(self, path, **more)
        return {p: i for p, i in paths.items() if "parts/" not in p or hash(p) % 2}

    monkeypatch.setattr(MemoryFileSystem, "_open", open_)
    if fault == "lists late":
        assert score(run, make_fake, HERE, io.StringIO()) == 0
        monkeypatch.setattr(MemoryFileSystem, "find", late)
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    monkeypatch.undo()
    assert annotations(run).equals(annotations(base))


def test_a_store_that_stays_away_is_named(url, monkeypatch):
    store = Remote(url)

    def never(*_, **__):
        raise OSError("503 Slow Down")

    monkeypatch.setattr(MemoryFileSystem, "_open", never)
    with pytest.raises(StorageError, match=r"writing /.*/x failed 5 times: OSError: 503 Slow Down"):
        store.write("x", b"1")
