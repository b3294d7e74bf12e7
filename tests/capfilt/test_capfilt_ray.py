"""The Ray engine on a real cluster of two nodes on this machine, with actors and nodes that go away."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from capfilt_crawl import HERE, check_complete, crawl, make_fake, planned, scored

from capfilt.__main__ import main
from capfilt.score import ray_engine
from capfilt.score.loop import score

PATIENCE = 120
"""Seconds in which something must happen."""


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    planned(crawl(tmp_path / "in", shards=1, rows=2), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["score", str(tmp_path / "run"), "--engine", "ray"]) == 2
    assert "pip install 'ray>=2.40'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return scored(crawl(folder / "in", shards=4, rows=96), folder / "run")


@pytest.fixture
def cluster(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("CAPFILT_FAKE_SECONDS", "0.01")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", str(PATIENCE))
    one = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=one)
    cluster.second = cluster.add_node(**one)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def in_background(run):
    outcome = {}
    out = io.StringIO()

    def work():
        outcome["status"] = ray_engine.score_with_ray(run, "cpu", HERE, 2, out)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, outcome, out


def until(parts, run):
    """Wait for so many parts; a machine with other work may be slow, but nothing for two minutes is a hang."""
    count, deadline = -1, 0.0
    while (now := len(run.parts.present())) < parts:
        if now != count:
            count, deadline = now, time.monotonic() + PATIENCE
        assert time.monotonic() < deadline, f"{now} parts, and no more for {PATIENCE} seconds"
        time.sleep(0.02)


def finished(thread, outcome, run):
    until(len(run.plan), run)
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it hangs"
    assert outcome["status"] == 0


def actors():
    """Process ids of the actors."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if b"ray::PartScorer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                pids.append(int(pid))
        except OSError:
            continue
    return pids


@pytest.mark.slow
def test_actors_are_killed(cluster, base, tmp_path):
    """Faults 12 and 17."""
    run = planned(base.job["root"], tmp_path / "run")
    thread, outcome, _ = in_background(run)
    for kill in range(1, 6):
        until(3 * kill, run)
        for pid in actors()[:1]:
            os.kill(pid, signal.SIGKILL)
    finished(thread, outcome, run)
    check_complete(run.where, base)


@pytest.mark.slow
def test_a_node_goes_away(cluster, base, tmp_path):
    """Fault 18."""
    run = planned(base.job["root"], tmp_path / "run")
    thread, outcome, _ = in_background(run)
    until(6, run)
    cluster.remove_node(cluster.second, allow_graceful=False)
    finished(thread, outcome, run)
    check_complete(run.where, base)


@pytest.mark.slow
def test_the_driver_is_killed_and_another_goes_on(cluster, base, tmp_path):
    """Fault 19."""
    run = planned(base.job["root"], tmp_path / "run")
    command = [sys.executable, "-m", "capfilt", "score", run.where, "--engine", "ray", "--workers", "2"]
    command += ["--device", "cpu", "--decode-workers", "0"]
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    until(4, run)
    driver.kill()
    driver.wait()
    thread, outcome, _ = in_background(run)
    finished(thread, outcome, run)
    check_complete(run.where, base)


@pytest.mark.slow
def test_another_engine_goes_on(cluster, base, tmp_path):
    """Fault 12: begun in one process, gone on with by one of three ranks, ended by Ray."""
    run = planned(base.job["root"], tmp_path / "run")
    assert score(run, make_fake, replace(HERE, limit=60), io.StringIO()) == 0
    assert score(run, make_fake, replace(HERE, rank=1, world=3), io.StringIO()) == 0
    assert 4 < len(run.parts.present()) < len(run.plan)
    thread, outcome, _ = in_background(run)
    finished(thread, outcome, run)
    check_complete(run.where, base)
