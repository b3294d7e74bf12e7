"""What all evaluations share, by a task of a few lines, which is all that a new one needs."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch

from blip import dist
from eval.__main__ import COMMANDS, main
from eval.runner import evaluating, in_parts, spread, table


@dataclass(frozen=True)
class CountingOptions:
    """Count.

    Examples:

        blip-eval counting --to 3
    """

    to: int
    """The last number."""
    model: str | None = None
    """None is needed."""
    out: str | None = None
    """Folder for scores.json."""


def evaluate(options, runner):
    numbers = spread(in_parts(range(1, options.to + 1), 2), list)
    if not dist.is_main():
        return
    runner.out.write("results.json", json.dumps(numbers))
    if options.to == 0:
        return runner.unscored("results.json", "numbers")
    runner.record("to", "model", numbers=len(numbers))
    runner.as_they_are = ("sum",)
    yield "share", 1 / options.to
    yield "sum", sum(numbers)


def test_a_task_is_its_options_a_function_and_a_line_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "counting", (CountingOptions, "test_runner"))
    monkeypatch.setitem(sys.modules, "test_runner", sys.modules[__name__])
    main(["counting", "--to", "5", "--out", str(tmp_path / "a")])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "share                     20.00",
        "sum                       15.00",
    ]
    assert json.loads((tmp_path / "a/results.json").read_text()) == [1, 2, 3, 4, 5]
    scores = (tmp_path / "a/scores.json").read_text()
    assert json.loads(scores) == {"share": 0.2, "sum": 15, "numbers": 5, "to": 5}
    assert list(json.loads(scores)) == ["share", "sum", "numbers", "to"], "scores, counts, and the options given"
    main(["counting", "--to", "0", "--out", str(tmp_path / "b")])
    assert "without numbers there is nothing to score" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["results.json"]
    main(["counting", "--to", "1"])
    assert "share                    100.00" in capsys.readouterr().out
    main(["--help"])
    assert "\n    blip-eval counting --to 3" in capsys.readouterr().out


def test_scores_are_printed_with_their_intervals():
    scores = {"a": 0.25, "a_low": 0.125, "a_high": 0.5, "b": 0.5, "b_low": None, "b_high": None, "rank": 3.0}
    assert table(scores, as_they_are=("rank",)).splitlines() == [
        "a                         25.00   95%  12.50 to  50.00",
        "b                         50.00",
        "rank                       3.00",
    ]
    assert table({"tr@1": 12.5}, times=1) == "tr@1                      12.50"


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_the_mode_that_it_was_in(training):
    model = torch.nn.Dropout().train(training)

    def stopped():
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert model.training == training
    assert torch.is_grad_enabled()
