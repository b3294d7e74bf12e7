"""Processes that are killed, stopped and starved while they score: the result is always that of an unbroken run."""

import errno
import io
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from capfilt_crawl import HERE, Starter, annotations, check_complete, crawl, jpeg, make_fake, planned, scored

from capfilt.run import Run
from capfilt.schema import USABLE
from capfilt.score.loop import score
from capfilt.select.choose import select
from capfilt.select.policies import SelectConfig
from capfilt.store import parts
from capfilt.store.parts import DamagedPart, name_of
from capfilt.store.storage import Local, StorageError
from capfilt.verify import verify

SLOW = {"CAPFILT_FAKE_SECONDS": "0.002"}


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    starter = Starter(tmp_path_factory.mktemp("starter") / "log")
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A crawl and an uninterrupted run on it."""
    folder = tmp_path_factory.mktemp("base")
    return scored(crawl(folder / "in", shards=4, rows=96), folder / "run")


def again(base, out):
    return planned(base.job["root"], out)


def torment(starter, run, kills, seed, workers, group=False, longest=0.6):
    """Score with so many kills at random times; returns how many there were, and how often a part was begun in vain."""
    dice, done, killed = random.Random(seed), {}, 0
    for _ in range(kills):
        pid = starter.start("score", run.where, "--decode-workers", str(workers), **SLOW)
        if not starter.kill(pid, dice.uniform(0.02, longest), group):
            break
        killed += 1
        present = run.parts.present()
        assert {pid: present[pid] for pid in done} == done  # what is committed is never done again
        done = present
    assert starter.run("score", run.where, "--decode-workers", "0") == 0, starter.log.read_text()[-800:]
    attempts = (run.parts.read(part.pid, ["attempt"])["attempt"][0].as_py() for part in run.plan)
    return killed, sum(attempt - 1 for attempt in attempts)


def test_killed_again_and_again(base, tmp_path, starter):
    """Fault 1, short."""
    run = again(base, tmp_path / "run")
    killed, wasted = torment(starter, run, 5, seed=0, workers=0)
    assert wasted <= 2 * killed > 0
    check_complete(run.where, base)
    assert verify(run.where).status() == 0
    assert not list((tmp_path / "run" / "parts").rglob(".tmp-*.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_twelve_times(base, tmp_path, starter, seed):
    """Fault 1: a kill costs the part in hand, and the one that is being written."""
    run = again(base, tmp_path / "run")
    killed, wasted = torment(starter, run, 12, seed, workers=0, longest=0.25)
    assert killed > 6
    assert wasted <= 2 * killed
    check_complete(run.where, base)


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", [False, True])
def test_killed_with_its_children(base, tmp_path, starter, group, kills):
    """Fault 2; killed alone, it leaves no decoder behind."""
    run = again(base, tmp_path / "run")
    torment(starter, run, kills, seed=1, workers=1, group=group, longest=2.0)
    check_complete(run.where, base)
    deadline = time.monotonic() + 10
    while (left := decoders(run.where)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def outcome(run, out):
    """What a job leaves: the bytes of its selection and export, and each row's id with what became of it."""
    rows = annotations(run)
    texts = pq.read_table(run.storage.path("selections/default/texts.parquet")).to_pylist()
    chosen = {text["sample_id"] for text in texts}
    refused = [i for i, status in zip(rows["sample_id"].to_pylist(), rows["status"].to_pylist(), strict=True)
               if status not in USABLE]  # fmt: skip
    assert sorted(chosen.union(refused)) == sorted(rows["sample_id"].to_pylist())  # each once: a list against a set
    files = [*(run.storage.path("selections/default").iterdir()), *out.iterdir()]
    return {file.name: file.read_bytes() for file in files if not file.name.startswith(".tmp-")}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_twenty_kills_anywhere_leave_the_same_bytes(base, tmp_path, starter, workers):
    """The whole of `capfilt run`, killed while it plans, scores, selects, exports, reports or verifies."""

    def args(name):
        where = ["--input", base.job["root"], "--out", tmp_path / name, "--to", tmp_path / f"{name}-out"]
        how = ["--scorer", "fake", "--part-size", "16", "--shard", "100", "--decode-workers", str(workers)]
        return ["run", *where, *how]

    start = time.monotonic()
    assert starter.run(*args("whole"), **SLOW) == 0, starter.log.read_text()[-800:]
    took = time.monotonic() - start
    wanted = outcome(Run.open(tmp_path / "whole"), tmp_path / "whole-out")
    assert len(wanted) > 5
    dice, at, killed = random.Random(workers), [], tmp_path / "killed"
    while len(at) < 20:
        pid = starter.start(*args("killed"), **SLOW)
        if starter.kill(pid, dice.uniform(0.01, 0.6 * took), group=True):
            at.append([(killed / name).exists() for name in ("job.json", "selections/default/_SUCCESS", "report")])
    assert starter.run(*args("killed"), **SLOW) == 0, starter.log.read_text()[-800:]
    assert len(set(map(tuple, at))) > 1  # the kills fell on different verbs
    run = Run.open(tmp_path / "killed")
    assert outcome(run, tmp_path / "killed-out") == wanted
    check_complete(run.where, base)


def decoders(where):
    """Decoding processes whose parent is gone."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file, open(f"/proc/{pid}/stat") as stat:
                if "capfilt.score.pool" in file.read() and stat.read().rpartition(")")[2].split()[1] == "1":
                    pids.append(int(pid))
        except OSError:
            continue
    return pids


POINTS = ["commit.before_fsync", "commit.after_tmp", "commit.after_replace", "commit.after_dir_fsync"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_step_of_a_commit(base, tmp_path, starter, point):
    """Fault 3: each kill loses at most the part that was being written; leftovers are swept when they are old."""
    run = again(base, tmp_path / "run")
    fault = {"CAPFILT_FAULT": f"{point}:3"}
    assert starter.run("score", run.where, "--decode-workers", "0", **fault) == -signal.SIGKILL
    whole, damaged = run.parts.whole(p.pid for p in run.plan)
    assert len(whole) == (3 if "replace" in point or "dir" in point else 2)
    assert damaged == {}
    torn = list((tmp_path / "run").rglob(".tmp-*"))
    assert len(torn) == ("tmp" in point or point == "commit.before_fsync")
    for path in torn:
        os.utime(path, (time.time() - 7200,) * 2)
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    check_complete(run.where, base)


def test_a_process_that_was_asleep_does_no_harm(base, tmp_path, starter):
    """Fault 4: stopped in the middle, its work done by another, then woken."""
    run = again(base, tmp_path / "run")
    pid = starter.start("score", run.where, "--decode-workers", "0", **SLOW)
    while len(run.parts.present()) < 3:
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    assert starter.run("score", run.where, "--decode-workers", "0") == 0
    check_complete(run.where, base)
    os.kill(pid, signal.SIGCONT)
    assert starter.wait(pid) == 0
    check_complete(run.where, base)
    assert not list((tmp_path / "run" / "failures").iterdir())


def test_two_jobs_on_one_run(base, tmp_path, starter):
    """Fault 14: the second says what it found, and both come to the same end."""
    run = again(base, tmp_path / "run")
    starter.log.write_text("")
    first = starter.start("score", run.where, "--decode-workers", "0", CAPFILT_FAKE_SECONDS="0.01")
    while not run.parts.present():
        time.sleep(0.01)
    second = starter.start("score", run.where, "--decode-workers", "0", **SLOW)
    assert [starter.wait(pid) for pid in (first, second)] == [0, 0]
    check_complete(run.where, base)
    log = starter.log.read_text()
    assert "in the hands of another process" in log
    assert "0 of 24 parts are done" in log


def test_asked_to_stop(base, tmp_path, starter):
    for name in (signal.SIGTERM, signal.SIGINT):
        run = again(base, tmp_path / name.name)
        pid = starter.start("score", run.where, "--decode-workers", "1", CAPFILT_FAKE_SECONDS="0.005")
        while not run.parts.present():
            time.sleep(0.01)
        os.killpg(pid, name)
        assert starter.wait(pid) == 130
        assert 0 < len(run.parts.present()) < 24
        assert not list((tmp_path / name.name / "failures").iterdir())  # nobody's fault
        assert starter.run("score", run.where, "--decode-workers", "0") == 0
        check_complete(run.where, base)


def test_a_disk_that_is_full(base, tmp_path):
    """Fault 5: a clean exit that names the disk, nothing partial, the same command continues."""
    run = again(base, tmp_path / "run")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # noqa: E731
    command = [sys.executable, "-m", "capfilt", "score", run.where, "--decode-workers", "0"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: could not write" in done.stderr
    assert "bytes are free" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    assert run.parts.whole(p.pid for p in run.plan) == (set(), {})
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    check_complete(run.where, base)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_now_and_then(base, tmp_path, monkeypatch, code):
    """Fault 5: the first write that fails ends the job by name; what was committed before stays."""
    run, sync, calls = again(base, tmp_path / "run"), os.fsync, []

    def fails(handle):
        calls.append(handle)
        if len(calls) == 9:
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageError, match=os.strerror(code)) as stop:
        score(run, make_fake, HERE, io.StringIO())
    assert str(tmp_path / "run" / "parts") in str(stop.value)
    assert ("Free some space" in str(stop.value)) == (code == errno.ENOSPC)
    monkeypatch.undo()
    done, damaged = run.parts.whole(p.pid for p in run.plan)
    assert len(done) >= 3
    assert damaged == {}
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    check_complete(run.where, base)


SMALL_DISK = 'mount -t tmpfs -o size=8k none "$1" || exit 77; shift; "$@"'


@pytest.mark.parametrize("verb", ["plan", "score", "select", "export", "report"])
def test_every_verb_on_a_small_disk(base, tmp_path, verb):
    """Fault 5 on a real disk that is full at once: one line that names the file, status 2."""
    run, out = again(base, tmp_path / "run"), tmp_path / "out"
    if verb != "score":
        score(run, make_fake, HERE, io.StringIO())
        select(run, "half", SelectConfig())
    args, small = {
        "plan": (["--input", base.job["root"], "--out", out, "--scorer", "fake"], out),
        "score": ([run.where, "--decode-workers", "0"], run.storage.path("parts")),
        "select": ([run.where, "--name", "more"], run.storage.path("selections/more")),
        "export": ([run.where, "--select", "half", "--to", out], out),
        "report": ([run.where, "--to", out], out),
    }[verb]
    small.mkdir()
    command = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", small, sys.executable, "-m", "capfilt", verb, *args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this user may not mount a small disk")
    assert (done.returncode, done.stderr.count("error: could not write")) == (2, 1), done.stderr
    assert str(small) in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", ["bit", "cut", "empty"])
def test_a_damaged_part_is_found_and_done_again(base, tmp_path, how):
    """Fault 6."""
    run = again(base, tmp_path / "run")
    score(run, make_fake, HERE, io.StringIO())
    before = run.parts.present()
    pid = run.plan[5].pid
    path = run.storage.path(name_of(pid))
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes({"bit": content, "cut": content[:-100], "empty": b""}[how])
    findings = verify(run.where)
    assert findings.status() == 4
    assert name_of(pid) in findings.problems[0]
    with pytest.raises(DamagedPart, match="run `score` again"):
        run.parts.read(pid)
    out = io.StringIO()
    assert score(run, make_fake, HERE, out) == 0
    assert "23 of 24 parts are done, 1 damaged" in out.getvalue()
    after = run.parts.present()
    assert {p for p in before if after[p] != before[p]} == {pid}
    check_complete(run.where, base)


def test_on_a_slow_disk_parts_are_looked_at_several_at_a_time(tmp_path, monkeypatch):
    run = scored(crawl(tmp_path / "in", shards=1, rows=120), tmp_path / "run", part_size=1)
    monkeypatch.setattr(parts, "_SLOW", -1.0)
    pids = sorted(part.pid for part in run.plan)
    for pid in (pids[5], pids[115]):  # the second after it was found that the disk is slow
        run.storage.path(name_of(pid)).write_bytes(b"")
    done, damaged = run.parts.whole(pids)
    assert (len(done), damaged.keys()) == (118, {pids[5], pids[115]})


def test_any_changed_byte_of_a_part_is_noticed(base):
    content = base.storage.read(name_of(base.plan[0].pid))
    parts.check(content)
    for at in [*range(0, len(content), 97), *range(len(content) - 200, len(content))]:
        changed = content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
        with pytest.raises(DamagedPart):
            parts.check(changed)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    storage = Local(tmp_path)
    storage.write("a/b", b"old")

    def fail():
        with storage.writing("a/b") as file:
            file.write(b"new")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"could not write .*a/b: .*Free some space.*: No space left"):
        fail()
    assert storage.read("a/b") == b"old"
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.slow
def test_finding_out_what_is_done_is_quick(tmp_path):
    """Fault 2: 10,000 finished parts in under 2 seconds of processor, which other work does not stretch."""
    from benchmarks.capfilt_job import annotated  # brings torch

    small = annotated(tmp_path, 160_000, 16)
    pids = [part.pid for part in small.plan]
    assert len(pids) == 10_000
    start = time.process_time()
    run = Run.open(small.where)
    done, damaged = run.parts.whole(pids)
    assert (len(done), damaged) == (10_000, {})
    assert time.process_time() - start < 2


# Soak -----------------------------------------------------------------------------------------------------------------

SOAK = int(os.environ.get("CAPFILT_SOAK", 100_000))
"""Rows; a million take some twenty minutes."""


def resources_of(pid):
    """Kilobytes in memory and open files of a process; None when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            (line,) = (line for line in file if line.startswith("VmRSS"))
        return int(line.split()[1]), len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError):
        return None


def soaked(starter, folder, rows, parts, kills):
    """Score so many rows with kills all over the run; returns it and what its last process held, over time."""
    (folder / "0.jpg").write_bytes(jpeg(0, (8, 8)))
    (folder / "a.json").write_text(json.dumps([{"image": "0.jpg", "caption": f"image {i}"} for i in range(rows)]))
    run = planned(folder / "a.json", folder / "run", part_size=-(-rows // parts))
    command = ("score", run.where, "--decode-workers", "0")
    for kill in range(kills):
        pid, aim = starter.start(*command), parts * (kill + 1) // (2 * kills)
        while len(run.parts.present()) < aim:
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        assert starter.wait(pid) == -signal.SIGKILL
    pid, samples = starter.start(*command), []
    while (sample := resources_of(pid)) and len(run.parts.present()) < parts:
        samples.append(sample)
        time.sleep(0.05)
    assert starter.wait(pid) == 0
    return run, samples


@pytest.mark.slow
def test_a_long_run_neither_grows_nor_loses(tmp_path, starter):
    """Fault 23: 1,000 parts and 20 kills; memory and open files of the process that does the second half stay level."""
    run, samples = soaked(starter, tmp_path, SOAK, 1000, 20)
    findings = verify(run.where)
    assert (findings.status(), sum(findings.rows.values())) == (0, SOAK)
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    for which, growth in ((0, 1.05), (1, 1.0)):
        before, after = (statistics.median(sample[which] for sample in some) for some in (early, late))
        assert after <= growth * before, (which, before, after)
