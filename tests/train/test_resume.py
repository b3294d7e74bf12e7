"""Runs that are killed, torn, full or asked to stop, and go on as if nothing had happened."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stub_run import HERE, Fault, Numbers, Stub, curve, quick, the_zygote

from blip import files, lock
from blip.lock import RunLock, RunLocked
from blip.tensors import read_pickled_tensors, read_tensors, write_tensors
from blip.train import drift
from blip.train.loop import TrainingInterrupted, fit
from blip.train.state import Checkpoints, State, restore


@pytest.fixture
def zygote():
    return the_zygote()


FACTS = {"settings": {}, "fingerprint": "", "layout": {"world": 1, "batch_size": 4, "accumulate": 1}}


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_often(zygote, out: Path, kills: int, world: int, steps: int) -> None:
    """Start the same run again and again, killing a process of it at random moments; then let it finish."""
    dice = random.Random(7)
    out.mkdir()
    log = out.parent / "log"
    # A process whose peer dies before they have met waits for it as long as the timeout says.
    arguments = {"world": world, "out": str(out), "steps": steps, "save_every": 5, "delay": 0.004, "timeout": 10.0}
    for _ in range(kills):
        done = lines(out)
        Path(f"{log}-0").unlink(missing_ok=True)
        pids = zygote.spawn(log, **arguments)
        aim, end = done + dice.randint(0, 12), time.monotonic() + 60
        while lines(out) < aim and not (out / "finished-0").exists() and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.02)
        os.kill(dice.choice(pids), signal.SIGKILL)
        assert all(zygote.wait(pid, 60) != 0 for pid in pids), "the run was over before the kill: give it more steps"
        redone = done - resumed_at(Path(f"{log}-0"))
        assert redone <= 5 + 1, f"{redone} steps were done again, more than a checkpoint's distance"
    assert zygote.run(log, **arguments) == [0] * world, Path(f"{log}-0").read_text()


def resumed_at(log: Path) -> int:
    if not log.exists():
        return 10**9
    steps = [line.split()[3] for line in log.read_text().splitlines() if line.startswith("continuing after step")]
    return int(steps[-1]) if steps else 10**9


def weights(out: Path) -> dict[str, list]:
    newest, _ = Checkpoints(out, 1).newest()
    tensors = read_tensors(newest / "objective.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def compare_with_undisturbed(zygote, tmp_path: Path, kills: int, world: int, steps: int) -> None:
    whole = tmp_path / "whole"
    assert zygote.run(tmp_path / "log", world=world, out=str(whole), steps=steps, save_every=5) == [0] * world
    kill_often(zygote, tmp_path / "killed", kills, world, steps)
    assert curve(tmp_path / "killed") == curve(whole)
    assert len(curve(whole)) == steps
    assert weights(tmp_path / "killed") == weights(whole)


@pytest.mark.parametrize(("world", "kills", "steps"), [(1, 4, 60), (2, 2, 40)])
def test_a_killed_run_continues_to_the_bit(zygote, tmp_path, world, kills, steps):
    compare_with_undisturbed(zygote, tmp_path, kills, world, steps)


def test_three_processes_add_up_in_the_same_order_after_a_restart(zygote, tmp_path):
    """Of three numbers the sum depends on the order, and with it on how gradients are laid out for the exchange."""
    whole, out = tmp_path / "whole", tmp_path / "continued"
    arguments = {"world": 3, "steps": 8, "save_every": 4}
    assert zygote.run(tmp_path / "log", out=str(whole), **arguments) == [0] * 3
    shutil.copytree(whole, out)
    shutil.rmtree(Checkpoints(out, 2).paths()[-1])
    assert loaded_step(out) == 4
    assert zygote.run(tmp_path / "log", out=str(out), **arguments) == [0] * 3
    assert curve(out) == curve(whole)
    assert weights(out) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "kills", "steps"), [(1, 20, 260), (2, 12, 170)])
def test_a_run_killed_often_continues_to_the_bit(zygote, tmp_path, world, kills, steps):
    compare_with_undisturbed(zygote, tmp_path, kills, world, steps)


def test_the_curve_depends_on_what_a_checkpoint_holds(tmp_path):
    """The comparison above can fail: a run that loses its queue, or its seed, has another curve."""
    fit(Stub(), Numbers(), quick(steps=12, save_every=6), out=tmp_path / "a")
    fit(Stub(), Numbers(), quick(steps=12, save_every=6, seed=1), out=tmp_path / "b")
    assert curve(tmp_path / "a") != curve(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    broken = Checkpoints(tmp_path / "c", 2).paths()
    shutil.rmtree(broken.pop())
    state = read_tensors(broken[0] / "objective.safetensors")
    state["queue"].zero_()
    write_tensors(broken[0] / "objective.safetensors", state)
    rewrite_manifest(broken[0])
    fit(Stub(), Numbers(), quick(steps=12, save_every=6), out=tmp_path / "c")
    assert curve(tmp_path / "a") != curve(tmp_path / "c")


def rewrite_manifest(path: Path) -> None:
    manifest = json.loads((path / files.MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"sha256": files.sha256(path / name), "bytes": (path / name).stat().st_size}
    (path / files.MANIFEST).write_text(json.dumps(manifest))


# Checkpoints


class Holder(torch.nn.Module):
    """One tensor with the number of the checkpoint it belongs to, to recognise mixtures by."""

    def __init__(self, number: int, size: int = 50):
        super().__init__()
        self.register_buffer("number", torch.full((size,), float(number)))


def save(out: Path, number: int, keep: int = 2, size: int = 50, more: dict | None = None) -> Path:
    extra = {"optimizer": {"number": torch.full((size,), float(number))}, "scaler": {}}
    return Checkpoints(out, keep).save(Holder(number, size), extra, State(step=number), {**FACTS, **(more or {})})


def loaded(out: Path) -> int:
    """The number of the newest checkpoint, which all of its parts must carry."""
    path, state = Checkpoints(out, 2).newest()
    holder = Holder(-1)
    extra = restore(path, holder)
    assert state["step"] == int(holder.number[0]) == int(extra["optimizer"]["number"][0]), "a mixture was loaded"
    return state["step"]


def save_and_die(out: str, at: int, torn: bool) -> None:
    """Save checkpoint 2 beside checkpoint 1 and lose power at event `at`; exit status 0 if there is no such event."""
    save(Path(out), 1, keep=1)
    count = 0

    def event(name: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == at:
            if torn and name == "after write":
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    files.checkpoint_event = event
    save(Path(out), 2, keep=1)


def test_power_loss_at_every_point_of_a_save_leaves_a_whole_checkpoint(zygote, tmp_path):
    steps = []
    for at in range(1, 40):
        for torn in (False, True):
            out = tmp_path / f"{at}-{torn}"
            arguments = {"module": "test_resume", "function": "save_and_die", "out": str(out), "at": at, "torn": torn}
            (status,) = zygote.run(tmp_path / "log", **arguments)
            steps.append(loaded(out))
            Checkpoints(out, 2).discard_after(None if status else Checkpoints(out, 2).newest()[0])
            assert not list(out.glob("**/.tmp-*"))
        if status == 0:
            break
    assert status == 0
    assert at >= 12, "four files written, a rename and a removal: at least twelve moments"
    assert steps == sorted(steps), "once the new checkpoint is there it must stay"
    assert set(steps) == {1, 2}


@pytest.mark.parametrize("name", ["objective.safetensors", "optimizer.pt", "state.json", files.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "zero"])
def test_damage_is_noticed_and_the_previous_checkpoint_used(tmp_path, caplog, name, damage):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        # In the manifest a byte of a digest, elsewhere one in the middle.
        at = content.index(b"sha256") + 12 if name == files.MANIFEST else len(content) // 2
        content[at] ^= 1
    elif damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "zero":
        content = bytearray(len(content))
    file.unlink() if damage == "delete" else file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path) == 1
    assert "step-00000002" in caplog.text
    assert damage == "flip" or name in caplog.text


def test_a_damaged_newest_checkpoint_is_passed_over_in_a_run(tmp_path):
    fit(Stub(), Numbers(), quick(steps=12, save_every=4), out=tmp_path / "a")
    before = curve(tmp_path / "a")
    newest = Checkpoints(tmp_path / "a", 2).paths()[-1]
    (newest / "optimizer.pt").write_bytes(b"")
    result = fit(Stub(), Numbers(), quick(steps=12, save_every=4), out=tmp_path / "a")
    assert result.steps == 12
    assert curve(tmp_path / "a") == before
    assert loaded_step(tmp_path / "a") == 12
    assert list((tmp_path / "a/checkpoints").glob("damaged-step-00000012-*"))


def loaded_step(out: Path) -> int:
    return Checkpoints(out, 2).newest()[1]["step"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for number in range(1, 6):
        save(tmp_path, number, keep=3)
    assert [path.name[-1] for path in Checkpoints(tmp_path, 3).paths()] == ["3", "4", "5"]


LARGE = {"objective.safetensors": (40_000, {}), "optimizer.pt": (20_000, {}), "state.json": (50, {"x": "y" * 100_000})}


def save_on_little_room(out: str, name: str) -> None:
    size, more = LARGE[name]
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    extra = {"optimizer": {"number": torch.zeros(size)}, "scaler": {}}
    holder = Holder(2, size if name == "objective.safetensors" else 50)
    Checkpoints(Path(out), 2).save(holder, extra, State(step=2), {**FACTS, **more})


@pytest.mark.parametrize("name", LARGE)
def test_a_full_disk_is_named_and_leaves_nothing_behind(zygote, tmp_path, name):
    save(tmp_path / "out", 1)
    arguments = {"module": "test_resume", "function": "save_on_little_room", "out": str(tmp_path / "out"), "name": name}
    assert zygote.run(tmp_path / "log", **arguments) == [1]
    line = (tmp_path / "log-0").read_text().splitlines()[-1]
    assert "WriteError: could not write" in line
    assert name in line
    assert "bytes are free" in line
    assert os.listdir(tmp_path / "out/checkpoints") == ["step-00000001"]
    assert loaded(tmp_path / "out") == 1


def test_a_disk_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(files.WriteError, match=r"step-00000002: needs about [\d,]+ bytes, 100 bytes are free"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_small_file_system_runs_full(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        save(small, 1)
        with pytest.raises(files.WriteError, match="bytes are free"):
            save(small, 2, size=40_000)
        assert loaded(small) == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Asked to stop


@pytest.mark.parametrize(("number", "world"), [("SIGTERM", 1), ("SIGUSR1", 2), ("SIGINT", 1)])
def test_a_signal_to_one_process_saves_and_stops_all(zygote, tmp_path, number, world):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    arguments = {"world": world, "steps": 40, "save_every": 1000}
    zygote.run(tmp_path / "log", out=str(whole), **arguments)
    pids = zygote.spawn(tmp_path / "log", out=str(out), delay=0.01, **arguments)
    while lines(out) < 6:
        time.sleep(0.005)
    os.kill(pids[-1], getattr(signal, number))
    assert [zygote.wait(pid, 30) for pid in pids] == [75] * world
    assert 6 <= loaded_step(out) < 40
    assert zygote.run(tmp_path / "log", out=str(out), **arguments) == [0] * world
    assert curve(out) == curve(whole)
    assert weights(out) == weights(whole)


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
}


def launch(name: str, out: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, *LAUNCHERS[name], str(HERE / "stub_run.py"), str(out), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def children(pid: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            pids.append(int(stat.parent.name))
    return pids


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def stop_launched(tmp_path: Path, launcher: str, target: str, number: signal.Signals, steps: int = 2000) -> Path:
    """Launch a run, signal its launcher or one of its processes, and see that it saves and that nothing is left."""
    out = tmp_path / "out"
    process = launch(launcher, out, steps=steps, save_every=10_000, delay=0.02)
    end = time.monotonic() + 90
    while lines(out) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    ranks = children(process.pid)
    assert ranks, "the launcher has no process"
    os.kill({"launcher": process.pid, "rank": ranks[-1]}[target], number)
    process.wait(40)
    assert process.returncode != 0
    assert gone(ranks, 30), "a process went on without its launcher"
    assert loaded_step(out) >= 3
    return out


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_a_launcher_saves(tmp_path, launcher):
    stop_launched(tmp_path, launcher, "launcher", signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_launched_process_saves(tmp_path, launcher, number):
    stop_launched(tmp_path, launcher, "rank", number)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_whose_launcher_was_killed_save_and_end(tmp_path, launcher):
    stop_launched(tmp_path, launcher, "launcher", signal.SIGKILL)


# One writer


def test_a_second_run_in_the_same_place_is_refused_at_once(zygote, tmp_path):
    out = tmp_path / "out"
    (first,) = zygote.spawn(tmp_path / "first", out=str(out), steps=10_000, delay=0.01)
    while lines(out) < 3:
        time.sleep(0.005)
    began = time.monotonic()
    assert zygote.run(tmp_path / "second", out=str(out), steps=10_000) == [1]
    assert time.monotonic() - began < 1
    line = (tmp_path / "second-0").read_text().splitlines()[-1]
    assert f"written to by process {first} on {socket.gethostname()}" in line
    os.kill(first, signal.SIGKILL)
    zygote.wait(first)
    assert zygote.run(tmp_path / "second", out=str(out), steps=10_000, fault={"kind": "stop", "step": 2}) == [75]
    assert "taking over the lock" in (tmp_path / "second-0").read_text()


def test_a_lock_of_another_machine_holds_while_it_is_touched(tmp_path):
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "5"}))
    with pytest.raises(RunLocked, match="process 1 on elsewhere"), RunLock(tmp_path):
        pass
    os.utime(lock, (time.time() - 100, time.time() - 100))
    with RunLock(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(RunLocked, match="this process"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_folder_was_removed_writes_nothing_more(tmp_path, again):
    """Whether or not another run has begun there since."""

    def remove(_):
        if not removed:
            removed.append(shutil.rmtree(out))
            if again:
                out.mkdir()
                (out / "run.lock").write_text("another's")
        return {}

    out, removed = tmp_path / "out", []
    with pytest.raises(RunLocked, match=r"out was removed or replaced while this run was writing to it"):
        fit(Stub(), Numbers(), quick(steps=10, save_every=100, eval_every=4), out=out, evaluate=remove)
    assert out.exists() == again
    assert not again or [path.name for path in out.iterdir()] == ["run.lock"]


def test_without_the_systems_record_locks_there_is_one_writer_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
    with RunLock(tmp_path), monkeypatch.context() as other:
        other.setattr(RunLock, "_locked_here", set())
        with pytest.raises(RunLocked, match=f"written to by process {os.getpid()}"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


# The same settings


def test_the_same_command_continues_or_says_that_all_is_done(tmp_path):
    evaluated = []
    options = {"out": tmp_path, "evaluate": lambda _: {"score": float(len(evaluated.append(1) or evaluated))}}
    with pytest.raises(TrainingInterrupted) as stop:
        fit(Stub(fault=Fault("stop", step=4)), Numbers(), quick(steps=10), **options)
    assert stop.value.code == 75
    assert loaded_step(tmp_path) == 5
    first = fit(Stub(), Numbers(), quick(steps=10), **options)
    again = fit(Stub(), Numbers(), quick(steps=10), **options)
    assert first == again
    assert first.steps == 10
    assert first.metrics == {"score": 1.0}
    assert len(evaluated) == 1, "an evaluation whose numbers are there is not repeated"


def test_an_evaluation_that_a_kill_prevented_is_made_up(tmp_path):
    fit(Stub(), Numbers(), quick(steps=4, save_every=2), out=tmp_path)
    result = fit(Stub(), Numbers(), quick(steps=4, save_every=2), out=tmp_path, evaluate=lambda _: {"score": 2.0})
    assert result.metrics == {"score": 2.0}
    assert len(curve(tmp_path)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 5e-3}, r"train\.lr: 0\.01 -> 0\.005"), ({"batch_size": 8}, "Continue with 1 processes of 4 pairs x 1")],
)
def test_other_settings_are_refused_and_listed(tmp_path, change, message):
    fit(Stub(), Numbers(), quick(steps=4), out=tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(Stub(), Numbers(), quick(steps=4, **change), out=tmp_path)
    fit(Stub(), Numbers(), quick(steps=4, allow_change=True, **change), out=tmp_path)


def test_other_data_or_processes_are_refused(tmp_path):
    saved = {**FACTS, "layout": {"world": 2, "batch_size": 4, "accumulate": 1}, "fingerprint": "old"}
    with pytest.raises(ValueError, match=r"(?s)fingerprint old -> new.*world 2 -> 1.*2 processes of 4 pairs x 1"):
        drift.refuse_drift(saved, {**FACTS, "settings": {}, "fingerprint": "new"}, tmp_path)


def test_remote_files_that_are_others_are_named(tmp_path):
    before = {"https://h/0.tar": [10240, '"a"'], "https://h/1.tar": [20480, ""], "https://h/2.tar": [1, "b"]}
    now = {**before, "https://h/1.tar": [30720, ""], "https://h/2.tar": [1, "c"]}
    saved, facts = ({**FACTS, "fingerprint": str(len(files)), "remote_files": files} for files in (before, now))
    saved["fingerprint"] = "old"
    message = (
        r"old -> 3 \(https://h/1.tar is another file now: 20,480 bytes, tag none -> 30,720 bytes, tag none, and 1 more"
    )
    with pytest.raises(ValueError, match=message):
        drift.refuse_drift(saved, facts, tmp_path)
    assert (
        drift.drift({"data": {"flip": 0}}, {"data": {"flip": 0, "remote": True}}) == []
    )  # older checkpoints do not have it
    signed = [{"data": {"path": f"https://h/0.tar?X-Amz-Signature={n}"}} for n in range(2)]
    assert drift.drift(*signed) == []


def test_a_checkpoint_with_former_names_of_settings_continues(tmp_path):
    before = {"data": {"rounds": 4, "wrong": 7, "alike": 3}}
    now = {"data": {"rounds": 4, "negatives": 7, "hard_negatives": 3}}
    with pytest.raises(TrainingInterrupted):
        fit(Stub(fault=Fault("stop", step=4)), Numbers(), quick(steps=10), out=tmp_path, settings=before)
    changed = {"data": {"rounds": 4, "negatives": 8, "hard_negatives": 2}}
    with pytest.raises(ValueError, match=r"\n  data\.hard_negatives: 3 -> 2\n  data\.negatives: 7 -> 8\nGo back"):
        fit(Stub(), Numbers(), quick(steps=10), out=tmp_path, settings=changed)
    assert loaded_step(tmp_path) == 5
    assert fit(Stub(), Numbers(), quick(steps=10), out=tmp_path, settings=now).steps == 10


def test_settings_that_touch_no_number_may_change(tmp_path):
    fit(Stub(), Numbers(), quick(steps=4, save_every=2), out=tmp_path)
    changed = quick(steps=4, save_every=3, log_every=2, keep_checkpoints=5, eval_every=2, timeout=5.0, skip_nonfinite=3)
    fit(Stub(), Numbers(), changed, out=tmp_path)
    assert drift.drift({"data": {"workers": 2}}, {"data": {"workers": 8}}) == []
    # As a run that had too many unreadable samples advises.
    assert drift.drift({"data": {"max_bad_fraction": 0.05}}, {"data": {"max_bad_fraction": 0.5}}) == []
    assert drift.drift({"data": {"flip": 0.5, "crop": 1}}, {"data": {"crop": 1}}) == ["data.flip: 0.5 -> (not set)"]
    old, kept, other = (
        {"decode": {"beams": 3, **rule}} for rule in ({}, {"length_rule": "generated"}, {"length_rule": "2022"})
    )
    assert drift.drift(old, kept) == []
    assert drift.drift(old, other) == ["decode.length_rule: generated -> 2022"]
    assert drift.drift({"train": {"lr": 1}}, {"train": {"lr": 1, "towers": []}, "clip": None}) == []
    locked = drift.drift({"train": {"lr": 1}}, {"train": {"lr": 1, "towers": [{"part": "vision"}]}})
    assert locked == ["train.towers: [] -> [{'part': 'vision'}]"]


def test_a_larger_batch_goes_on_where_the_data_was(tmp_path):
    fit(Stub(), Numbers(), quick(steps=4), out=tmp_path)
    data = Numbers()
    fit(Stub(), data, quick(steps=6, batch_size=8, allow_change=True), out=tmp_path)
    assert data.seen[0] == [f"pair:{i}" for i in range(16, 24)]


def test_new_hyper_parameters_take_effect_when_allowed(tmp_path):
    fit(Stub(), Numbers(), quick(steps=2), out=tmp_path)
    stub = Stub()
    fit(
        stub,
        Numbers(),
        quick(steps=4, allow_change=True, weight_decay=0.0, lr=0.0, warmup_lr=0.0, min_lr=0.0),
        out=tmp_path,
    )
    state = Checkpoints(tmp_path, 2).newest()[0]
    groups = read_pickled_tensors(state / "optimizer.pt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_a_checkpoint_of_another_objective_is_refused_by_name(tmp_path):
    fit(Stub(), Numbers(), quick(steps=2), out=tmp_path)
    other = Stub()
    other.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"objective\.safetensors does not fit"):
        fit(other, Numbers(), quick(steps=2), out=tmp_path)


def test_a_run_directory_says_how_it_was_made(tmp_path):
    fit(Stub(), Numbers(), quick(steps=2), out=tmp_path, settings={"model": {"width": 8}, "out": tmp_path})
    assert "width: 8" in (tmp_path / "config.yaml").read_text()
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert start["host"] == socket.gethostname()


def test_a_setting_that_is_younger_than_the_checkpoint_drifts_only_from_what_was_done_then():
    before = {"train": {"lr": 1.0}, "decode": {"beams": 3}}
    now = {"train": {"lr": 1.0, "towers": []}, "decode": {"beams": 3, "length_rule": "generated"}, "clip": None}
    assert drift.drift(before, now) == []
    changed = now | {"decode": {"beams": 3, "length_rule": "2022"}}
    assert drift.drift(before, changed) == ["decode.length_rule: generated -> 2022"]
    assert drift.drift(before, now | {"train": {"lr": 1.0, "towers": [], "clip": None}}) == [
        "train.clip: (not set) -> None"
    ]
