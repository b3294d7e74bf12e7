"""Whole pre-training runs on sources behind addresses: the losses of local files, killed, disturbed and refused."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from range_server import RangeServer
from stub_run import curve
from test_recipes import ALL_RANDOM, FEW, assert_same_run, finish, lines, refused, the_recipe_zygote

from blip.world import files as world_files

STEPS = 6
SHORT = ["--train.steps", "1", "--data.workers", "0"]


class CachedZygote:
    """The zygote of all recipes, whose processes keep what they know of remote files in a folder."""

    def __init__(self, cache: Path):
        self.cache, self.shared = cache, the_recipe_zygote()

    def start(self, log: Path, args: list[str], **options) -> list[int]:
        return self.shared.start(log, args, environment={"OPENBLIP_CACHE": str(self.cache)}, **options)

    def wait(self, pid: int, seconds: float) -> int:
        return self.shared.wait(pid, seconds)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    return CachedZygote(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four tar and four parquet shards of the synthetic world, and one of held-out images."""
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("tar", "parquet"):
        world_files.write(folder, kind, "train", 60, size=32, shard=15)
        world_files.write(folder, kind, "test", 10, size=32)
    return folder


@pytest.fixture(scope="module")
def here(zygote, shards, tmp_path_factory) -> Path:
    """A run on the local tar shards."""
    folder = tmp_path_factory.mktemp("here")
    finish(zygote, folder, options(shards, str(shards), "tar", folder / "out"))
    return folder / "out"


@pytest.fixture
def server(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "served")
    with RangeServer(tmp_path / "served") as running:
        yield running


def paths(folder: Path, split: str, kind: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{split}*.{kind}"))


def options(folder: Path, where: str, kind: str, out: Path, *more: str, query: str = "") -> list[str]:
    """The options of a run on the shards of a folder, by their names under `where`."""
    train = "::".join(f"{where}/{name}{query}" for name in paths(folder, "train", kind))
    test = f"{where}/{paths(folder, 'test', kind)[0]}{query}"
    remote = ["--data.remote", "true"] if "://" in where else []
    held_out = ["--held_out", json.dumps({"source": {"path": test}, "k": 4})]
    sources = ["--data.sources", json.dumps([{"path": train}])]
    changed = [*ALL_RANDOM, "--train.steps", str(STEPS), "--train.save_every", "3"]
    return [*FEW, *sources, *held_out, *remote, *changed, "--out", str(out), *more]


def assert_same_scores(a: Path, b: Path) -> None:
    first, second = (json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval"] for out in (a, b))
    assert first == second


def plant_faults(server: RangeServer, kind: str) -> None:
    for name in paths(server.folder, "train", kind):
        server.faults[name] = ["", "503", "", "drop"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "streaming"), [("tar", "false"), ("parquet", "false"), ("tar", "true")])
def test_losses_are_those_of_local_files(zygote, server, tmp_path, kind, streaming):
    how = ["--data.streaming", streaming, "--data.shuffle_buffer", "16"]
    finish(zygote, tmp_path, options(server.folder, str(server.folder), kind, tmp_path / "here", *how))
    plant_faults(server, kind)
    finish(zygote, tmp_path, options(server.folder, server.address, kind, tmp_path / "there", *how))
    assert_same_run(tmp_path / "here", tmp_path / "there", STEPS)
    assert_same_scores(tmp_path / "here", tmp_path / "there")
    assert not list((tmp_path / "there").glob("bad_samples*"))


@pytest.mark.parametrize(
    ("processes", "kills"), [(1, (4,)), pytest.param(1, (2, 5), marks=pytest.mark.slow),
                             pytest.param(2, (2, 5), marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_killed_and_disturbed_run_continues_to_the_bit(zygote, server, here, tmp_path, processes, kills):
    if processes > 1:
        local = options(server.folder, str(server.folder), "tar", tmp_path / "here")
        finish(zygote, tmp_path, local, world=processes)
        here = tmp_path / "here"
    args, dice = options(server.folder, server.address, "tar", tmp_path / "there"), random.Random(1)
    plant_faults(server, "tar")
    for kill in kills:
        pids = zygote.start(tmp_path / "log", args, world=processes)
        end = time.monotonic() + 120
        while lines(tmp_path / "there") < kill and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(dice.choice(pids), signal.SIGKILL)
        assert -signal.SIGKILL in [zygote.wait(pid, 120) for pid in pids]
    finish(zygote, tmp_path, args, world=processes)
    assert_same_run(here, tmp_path / "there", STEPS)
    assert_same_scores(here, tmp_path / "there")
    assert not list((tmp_path / "there").glob("bad_samples*"))


def test_another_file_is_refused_by_name_when_a_run_continues(zygote, server, tmp_path):
    args = options(server.folder, server.address, "tar", tmp_path / "out", *SHORT)
    finish(zygote, tmp_path, args)
    name = paths(server.folder, "train", "tar")[2]
    size = (server.folder / name).stat().st_size
    server.tags[name] = '"changed"'
    line = refused(zygote, tmp_path, args)
    assert f"{server.address}/{name} is another file now: {size:,} bytes, tag" in line.replace("\\n", "")
    assert '"changed"' in line
    finish(zygote, tmp_path, [*args, "--train.allow_change", "true", "--train.steps", "2"])
    assert len(curve(tmp_path / "out")) == 2


def test_signatures_of_addresses_are_in_no_file_of_a_run(zygote, server, tmp_path):
    def signed(signature):
        query = f"?X-Amz-Signature={signature}"
        return options(server.folder, server.address, "tar", tmp_path / "out", *SHORT, query=query)

    (server.folder / paths(server.folder, "train", "tar")[0]).write_bytes(b"not a tar at all" * 64)
    line = refused(zygote, tmp_path, signed("sesame"))
    assert "sesame" not in line
    first, *others = paths(server.folder, "train", "tar")
    shutil.copy(server.folder / others[0], server.folder / first)
    finish(zygote, tmp_path, signed("sesame"))
    finish(zygote, tmp_path, signed("anew77"))  # signed again: still the same run
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "state.json", "README.md"} <= {path.name for path in files}
    for path in [*files, tmp_path / "log-0"]:
        content = path.read_bytes()
        assert b"sesame" not in content, path
        assert b"anew77" not in content, path
