"""Several processes on one machine and on many: `capfilt launch`, srun and the MPIs; GPUs pretended, processes real."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from capfilt_crawl import HERE, annotations, check_complete, crawl, planned, scored
from test_capfilt_models import tiny

from blip import dist, processes
from blip.checkpoints.checkpoint import save_pretrained
from capfilt.__main__ import main
from capfilt.run import Run
from capfilt.score import launch
from capfilt.score.loop import score
from capfilt.score.models import BlipScorer
from capfilt.score.progress import CombinedProgress, line_of
from capfilt.verify import verify

PATIENCE = 300
TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "64", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for rank, world in processes._PLACES:
        monkeypatch.delenv(rank, raising=False)
        monkeypatch.delenv(world, raising=False)
    for name in (*dist.LOCAL_RANKS, *TASK, "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """Eight GPUs, as far as a machine without any can pretend."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return scored(crawl(folder / "in", shards=4, rows=96), folder / "run")


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        (TASK, (9, 64)),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "64"}, (9, 64)),
        ({**TASK, "RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),  # torchrun in a step
        ({**TASK, "WORLD_SIZE": "64"}, (9, 64)),  # exported by a batch script for all of its tasks
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, (0, 1)),  # the batch script itself
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
    ],
)
def test_a_process_knows_its_place(monkeypatch, environment, place):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.place() == place


def test_a_number_of_processes_without_ranks_is_refused(monkeypatch, base, capsys):
    """Each of them would take the share of the first."""
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert main(["score", base.where]) == 2
    assert "RANK is not set" in capsys.readouterr().err


def test_64_tasks_of_srun_take_their_parts_and_their_gpu(tmp_path, monkeypatch, gpus):
    """`srun capfilt score RUN`, eight tasks on each of eight machines, without further options."""
    folder = crawl(tmp_path / "in", shards=2, rows=150)
    run, devices = planned(folder, tmp_path / "run", part_size=2), []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "64")
    before = set()
    for rank in range(64):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURM_LOCALID", str(rank % 8))
        assert main(["score", run.where, "--decode-workers", "0"]) == 0
        devices.append(str(dist.own_device()))
        after = run.parts.present().keys()
        assert after - before == {part.pid for part in run.plan if int(part.pid[:8], 16) % 64 == rank}
        before = after
    assert devices == [f"cuda:{i}" for i in range(8)] * 8
    check_complete(run.where, scored(folder, tmp_path / "base", part_size=2))


# GPUs -----------------------------------------------------------------------------------------------------------------


def test_gpus_are_counted(gpus, monkeypatch):
    assert [launch.count_of(given, "auto") for given in ("all", "8", "3")] == [8, 8, 3]
    assert launch.count_of("20", "cpu") == 20
    for given, device, message in (
        ("9", "auto", "only 8 are visible"),
        ("0", "auto", "1 or more, or all, got '0'"),
        ("many", "auto", "1 or more, or all, got 'many'"),
        ("all", "cpu", "give the number of processes"),
        ("2", "cuda:1", "each process has its own"),
    ):
        with pytest.raises(ValueError, match=message):
            launch.count_of(given, device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for given in ("all", "1"):
        with pytest.raises(ValueError, match="no GPU is visible"):
            launch.count_of(given, "auto")


class Ended:
    """A process that has done its work at once."""

    returncode = 0

    def __init__(self, command, env, **_):
        Ended.started.append((command, env))
        self.stderr = io.StringIO("")

    def wait(self):
        return 0

    def kill(self):
        pass


@pytest.mark.parametrize("machine", [None, 0, 7])
def test_each_gpu_has_a_process(base, gpus, monkeypatch, machine):
    """On one machine, and as one of eight tasks of srun, one per machine."""
    if machine is not None:
        for name, value in {**TASK, "SLURM_NTASKS": "8", "SLURM_PROCID": machine, "SLURM_LOCALID": 0}.items():
            monkeypatch.setenv(name, str(value))
    Ended.started = []
    monkeypatch.setattr(launch.subprocess, "Popen", Ended)
    assert main(["launch", base.where, "--batch", "512", "--also", "embedding"]) == 0
    places, devices = [], []
    for command, environment in Ended.started:
        assert command[-4:] == ["score", base.where, "--also=embedding", "--batch=512"]
        with monkeypatch.context() as child:
            for name, value in environment.items():
                child.setenv(name, value)
            places.append(processes.place())
            devices.append(str(dist.own_device()))
    first, world = (0, 8) if machine is None else (8 * machine, 64)
    assert places == [(first + i, world) for i in range(8)]
    assert devices == [f"cuda:{i}" for i in range(8)]


def test_what_a_launch_refuses(base, capsys):
    for more, message in ((["--engine", "ray"], "--engine ray"), (["--dry-run"], "one process")):
        assert main(["launch", base.where, "--device", "cpu", "--gpus", "2", *more]) == 2
        assert message in capsys.readouterr().err


# Processes ------------------------------------------------------------------------------------------------------------


def start(run, count, **environment):
    command = [sys.executable, "-m", "capfilt", "launch", run.where, "--gpus", str(count), "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--decode-workers", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(launcher):
    return psutil.Process(launcher.pid).children()


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


SLOW = {"CAPFILT_FAKE_SECONDS": "0.02"}


def test_a_worker_that_dies_stops_no_other(base, tmp_path):
    run = planned(base.job["root"], tmp_path / "run")
    launcher = start(run, 3, **SLOW)
    until(lambda: len(run.parts.present()) > 2)
    victim = workers(launcher)[1]
    victim.kill()
    stderr = launcher.communicate(timeout=PATIENCE)[1]
    assert launcher.returncode == 3
    assert "process 1 was ended by SIGKILL; the same command scores the parts that it has left" in stderr
    shares = [{part.pid for part in run.share(rank, 3)} for rank in range(3)]
    present = run.parts.present().keys()
    assert shares[0] | shares[2] <= present
    assert shares[1] - present
    launcher = start(run, 2)  # another number of processes
    assert launcher.communicate(timeout=PATIENCE)[1].count("parts are done") == 2
    assert launcher.returncode == 0
    check_complete(run.where, base)
    assert verify(run.where).status() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(base, tmp_path, number):
    run = planned(base.job["root"], tmp_path / "run")
    launcher = start(run, 2, **SLOW)
    until(lambda: len(run.parts.present()) > 1)
    pids = workers(launcher)
    launcher.send_signal(number)
    launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 130
    assert not any(one.is_running() for one in pids)
    assert not list((tmp_path / "run" / "failures").iterdir())  # nobody's fault
    assert 1 < len(run.parts.present()) < len(run.plan)


@pytest.mark.slow
def test_without_a_launcher_its_workers_end(base, tmp_path):
    """They notice it when they report."""
    run = planned(base.job["root"], tmp_path / "run")
    launcher = start(run, 2, CAPFILT_FAKE_SECONDS="0.2")
    until(lambda: len(run.parts.present()) > 1)
    pids = workers(launcher)
    launcher.kill()
    until(lambda: not any(one.is_running() for one in pids))
    assert len(run.parts.present()) < len(run.plan)
    launcher.wait()
    launcher = start(run, 2)
    launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0
    check_complete(run.where, base)


def test_all_steps_with_real_models(tmp_path, capfd):
    """`capfilt run --gpus`: two processes score as one does, and the rest follows."""
    for name, seed in (("captioner", 0), ("filter", 1)):
        save_pretrained(*tiny(seed), tmp_path / name)
    folder = crawl(tmp_path / "in", shards=2, rows=24)
    models = ["--captioner", str(tmp_path / "captioner"), "--filter", str(tmp_path / "filter")]
    job = ["run", "--input", str(folder), *models, "--part-size", "8", "--decode-workers", "0", "--device", "cpu"]
    assert main([*job, "--out", str(tmp_path / "one"), "--to", str(tmp_path / "one-out"), "--itm", "0"]) == 0
    capfd.readouterr()
    assert main([*job, "--out", str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--itm", "0", "--gpus", "2"]) == 0
    assert "nothing is wrong" in capfd.readouterr().out
    assert annotations(tmp_path / "run").equals(annotations(tmp_path / "one"))
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("one-out", "out")
    )
    assert one == two != {}
    workers = {row for part in Run.open(tmp_path / "run").plan for row in _workers(tmp_path / "run", part)}
    assert len(workers) == 2


def _workers(where, part):
    return Run.open(where).parts.read(part.pid, ["worker"])["worker"].to_pylist()


# Progress -------------------------------------------------------------------------------------------------------------


def report(rows, rate, left, web, busy):
    return {"rows": rows, "of": 500, "inherited": 10, "rows_per_second": rate, "seconds_left": left,
            "give_or_take": 1, "web_scored": web, "syn_scored": [0, 0], "statuses": {"ok": rows - 15, "truncated": 5},
            "texts_left_out": 1, "busy": {"models": busy, "decode": 1 - busy}, "parts": 3, "parts_of": 50,
            "retried": 1, "failed": 0}  # fmt: skip


def test_progress_of_all_processes_is_one():
    out = io.StringIO()
    progress = CombinedProgress(1000, 100, out)
    progress.reports = {0: report(100, 5.0, 80, [30, 40], 0.9), 1: report(200, 10.0, 30, [10, 160], 0.5)}
    line = line_of(progress.report())
    for part in ("rows 300/1000 30.0%", "15 img/s", "ETA 1m20", "web 20.0%", "errors 3.57% (truncated 3.57%)",
                 "2 texts left out", "models busy 70%, wait decode 30%", "parts 6/100 retried 2 failed 0"):  # fmt: skip
        assert part in line
    progress.finish(0)
    assert (progress.report()["rows_per_second"], progress.report()["seconds_left"]) == (10.0, 30)
    progress.say(always=True)
    assert json.loads(out.getvalue())["processes"] == 2


def test_the_launcher_shows_every_line_once(base, tmp_path, capfd):
    run = planned(base.job["root"], tmp_path / "run")
    assert main(["launch", run.where, "--gpus", "2", "--device", "cpu", "--decode-workers", "0"]) == 0
    *lines, last = capfd.readouterr().err.splitlines()
    assert [line[:16] for line in sorted(lines) if line.startswith("process")] == [
        "process 0 of 2: ",
        "process 1 of 2: ",
    ]
    assert {json.loads(last)[key] for key in ("rows", "of")} == {384}
    assert json.loads(last)["parts"] == json.loads(last)["parts_of"] == 24
    assert score(run, BlipScorer.load, HERE, io.StringIO()) == 0  # nothing is left for models
