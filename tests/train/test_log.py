"""What a run says: each step once, means of windows, alarms in plain words, trackers that are there or refused."""

import importlib.util
import io
import json
import math

import pytest
from stub_run import Numbers, Stub, quick

from blip.train.log import (
    CONSTANT_ITM,
    Alarms,
    Metrics,
    TrainingProgress,
    Window,
    check_trackers,
    read_metrics,
)
from blip.train.loop import fit


def test_lines_of_steps_to_be_redone_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "losses": {}}\n{"step": 2}\n{"step": 2, "eval": {}}\n{"step": 3}\n{"step": 4, "lo')
    metrics = Metrics(path, 2)
    assert [line["step"] for line in metrics.lines_before] == [1, 2, 2]
    metrics.write({"step": 3, "losses": {"itc": 0.1 + 0.2}})
    metrics.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2, 3]
    assert read_metrics(path)[-1]["losses"]["itc"] == 0.1 + 0.2


def test_a_window_averages_and_survives_being_saved():
    window = Window()
    for value in (0.1, 0.2, 0.7):
        window.add({"itc": value})
    window.add({"itm": 2.0})
    again = Window(json.loads(json.dumps(window.values)))
    again.add({"itc": 0.1})
    window.add({"itc": 0.1})
    assert again.means() == window.means()
    assert window.means() == {"itc": pytest.approx(0.275), "itm": 2.0}


def test_the_constant_predictor_of_matching():
    assert pytest.approx(0.6365, abs=5e-5) == CONSTANT_ITM


def test_a_matching_head_that_does_not_learn_raises_one_alarm():
    alarms = Alarms(warmup_steps=100)
    raised = [alarms.check(step, {"itm": 0.6365}, 0.1) for step in range(50, 400, 50)]
    assert [bool(messages) for messages in raised] == [False, False, False, False, True, False, False]
    assert "0.6365" in raised[4][0]
    assert "matching head is not learning" in raised[4][0]


@pytest.mark.parametrize("losses", [{"itm": 0.632}, {"itm": 0.641}, {"itc": 0.6365}, {}])
def test_other_losses_raise_none(losses):
    alarms = Alarms(warmup_steps=0)
    assert not any(alarms.check(step, losses, 0.1) for step in range(1, 20))


def test_waiting_for_data_raises_an_alarm_that_says_what_to_do():
    alarms = Alarms(warmup_steps=10**6)
    raised = [alarms.check(step, {}, wait) for step, wait in enumerate([0.9, 0.9, 0.1, 0.6, 0.6, 0.6, 0.6])]
    assert [bool(messages) for messages in raised] == [False, False, False, False, False, True, False]
    assert "data.workers" in raised[5][0]


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = TrainingProgress(100, 0, True, stream)
    progress.report(50, {"itc": 1.25}, 12.34)
    assert stream.getvalue().startswith("step 50/100  itc 1.25  12.3 samples/s  0:00:0")
    quiet = io.StringIO()
    TrainingProgress(100, 0, False, quiet).say("nothing")
    assert quiet.getvalue() == ""


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = TrainingProgress(4, 0, True, stream)
    progress.advance()
    progress.report(1, {"itc": 1.25}, 12.34)
    progress.say("a word")
    progress.close()
    assert "itc 1.25  12.3 samples/s" in stream.getvalue()
    assert "a word" in stream.getvalue()


def test_a_tracker_that_is_not_installed_is_an_error_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'wandb>="):
        fit(Stub(), Numbers(), quick(steps=2, trackers=["wandb"]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="not one of tensorboard, wandb, trackio"):
        check_trackers(["mlflow"])


def test_tensorboard_is_written_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    fit(Stub(), Numbers(), quick(steps=2, trackers=["tensorboard"]), out=tmp_path)
    assert list(tmp_path.glob("**/events.out.tfevents*"))


def test_a_log_line_holds_the_health_of_a_run(tmp_path):
    fit(Stub(), Numbers(), quick(steps=7, log_every=3), out=tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line in lines:
        assert {"loss", "itc", "lm", "spread", "grad_norm", "lr"} == line["losses"].keys()
        assert line["losses"]["loss"] == pytest.approx(line["losses"]["itc"] + line["losses"]["lm"])
        assert line["tokens_per_s"] == pytest.approx(3 * line["samples_per_s"])
        assert 0 <= line["data_wait"] <= 1
        assert math.isfinite(line["seconds"])
        assert line["epoch"] == line["step"] * 4 / 32
