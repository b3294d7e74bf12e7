"""Stages: done once, in order, by one process, and never with other settings than those that were said."""

import json
import threading

import pytest

from blip.lock import RunLock
from recipes.bootstrap import stages
from recipes.bootstrap.stages import Stage, Stages


def counted(log: list, name: str, result: int = 0):
    def work(folder):
        log.append(name)
        (folder / "checkpoints").mkdir()
        return {"value": result}

    return work


def chain(log: list, setting: int = 1) -> list[Stage]:
    return [
        Stage("a", counted(log, "a", 1), {"setting": setting}),
        Stage("b/c", counted(log, "b/c", 2), {"other": [1, 2]}, ("a",), cost=3),
        Stage("d", counted(log, "d", 3), {}, ("a", "b/c")),
    ]


def test_each_is_done_once_and_in_order(tmp_path):
    log, messages = [], []
    work = Stages(tmp_path, chain(log), messages.append)
    after = []
    work.carry_out(lambda: after.append(len(log)))
    assert log == ["a", "b/c", "d"]
    assert after == [1, 2, 3]
    assert work.results("b/c") == {"value": 2}
    assert not (tmp_path / "d" / "checkpoints").exists()
    assert "stage 2 of 3: b/c" in messages[2]
    assert "1 done" in messages[2]
    again = Stages(tmp_path, chain(log), messages.append)
    again.carry_out()
    assert log == ["a", "b/c", "d"]
    assert again.results("d") == {"value": 3}


def test_what_failed_is_done_again_and_nothing_else(tmp_path):
    log = []

    def fails(folder):
        log.append("fails")
        if log.count("fails") == 1:
            raise RuntimeError("killed")
        return {}

    def planned() -> Stages:
        return Stages(tmp_path, [*chain(log), Stage("e", fails, {}, ("d",))], lambda line: None)

    with pytest.raises(RuntimeError, match="killed"):
        planned().carry_out()
    with pytest.raises(ValueError, match=r"stage e of .* is not done"):
        planned().results("e")
    planned().carry_out()
    assert log == ["a", "b/c", "d", "fails", "fails"]


def test_other_settings_are_refused_by_name(tmp_path):
    log = []
    Stages(tmp_path, chain(log), lambda line: None).carry_out()
    changed = Stages(tmp_path, chain(log, setting=2), lambda line: None)
    with pytest.raises(ValueError, match=r"a was made with other settings: setting: 1 -> 2.*choose another --out"):
        changed.carry_out()
    with pytest.raises(ValueError, match="d was made with other settings: a stage that it needs differs"):
        changed.record("d")
    assert log == ["a", "b/c", "d"]


def test_a_damaged_record_is_named(tmp_path):
    work = Stages(tmp_path, chain([]), lambda line: None)
    work.carry_out()
    path = tmp_path / "b/c" / stages.RECORD
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=r"b/c/stage.json cannot be read .* remove"):
        work.results("b/c")


def test_a_stage_needs_one_that_comes_before(tmp_path):
    with pytest.raises(ValueError, match="stage b needs c, not listed before it"):
        Stages(tmp_path, [Stage("b", dict, {}, ("c",)), Stage("c", dict)])


def test_what_another_process_does_is_left_to_it(tmp_path, monkeypatch):
    """Its lock is held: what does not need it is done, then it is waited for, and its result is used."""
    monkeypatch.setattr(stages, "_POLL", 0.02)
    log, messages = [], []
    work = Stages(tmp_path, [*chain(log), Stage("free", counted(log, "free"))], messages.append)
    lock = RunLock(tmp_path / stages.LOCKS / "a")
    lock.__enter__()
    waited = threading.Event()

    def other() -> None:
        waited.wait(20)
        record = {"fingerprint": work.fingerprints["a"], "settings": {"setting": 1}, "seconds": 1, "results": {"x": 1}}
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / stages.RECORD).write_text(json.dumps(record))
        lock.__exit__()

    thread = threading.Thread(target=other)
    thread.start()

    def say(line: str) -> None:
        messages.append(line)
        if "waiting for a" in line:
            waited.set()

    work.say = say
    work.carry_out()
    thread.join()
    assert log == ["free", "b/c", "d"]
    assert any("waiting for a, which another process is doing" in line for line in messages)
    assert work.results("a") == {"x": 1}
