"""Parts that are locked for a time or learn more slowly: by hand, over a restart, in two processes."""

import itertools
import os
import signal

import pytest
import torch
from stub_run import Numbers, curve, quick, the_zygote
from torch import nn

from blip.objectives.objective import Clock, Objective, Outcome
from blip.train.loop import TrainingInterrupted, fit
from blip.train.state import Checkpoints
from blip.train.towers import Tower, TowerSchedule


class Two(Objective):
    """Two towers with dropout, whose outputs are to agree; asks to be stopped in the step `stop`."""

    def __init__(self, stop: int = -1, dropout: float = 0.2):
        super().__init__()
        torch.manual_seed(2)
        layers = [nn.Sequential(nn.Linear(12, 8), nn.Dropout(dropout), nn.Linear(8, 8)) for _ in "it"]
        self.model = nn.ModuleDict({"image": layers[0], "text": layers[1]})
        self.stop, self.steps = stop, 0
        self.history: list[dict[str, torch.Tensor]] = []

    def forward(self, batch, clock):
        assert clock.progress == clock.step / 10
        self.history.append({name: value.clone() for name, value in self.model.state_dict().items()})
        if clock.step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        flat = batch.image.flatten(1)
        image, text = self.model["image"](flat), self.model["text"](-flat)
        return Outcome({"apart": (image - text).square().mean() + (image.mean(1) - 1).square().mean()}, {})


def run(out, *towers: Tower, stop: int = -1, **options) -> Two:
    two = Two(stop)
    given = {"steps": 10, "warmup_steps": 0, "schedule": "constant", "towers": list(towers), **options}
    fit(two, Numbers(), quick(**given), out=out)
    return two


def moves(two: Two, part: str) -> list[bool]:
    """For each step whether any weight of the part changed."""
    states = [*two.history, two.model.state_dict()]
    names = [name for name in states[0] if name.startswith(part)]
    return [any(not torch.equal(a[n], b[n]) for n in names) for a, b in itertools.pairwise(states)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_locked_part_does_not_move_until_its_time(tmp_path, optimizer, capsys):
    two = run(tmp_path, Tower("image", locked_until=0.4), weight_decay=0.5, optimizer=optimizer)
    assert moves(two, "image") == [False] * 4 + [True] * 6
    assert moves(two, "text") == [True] * 10
    stderr = capsys.readouterr().err
    assert "step 0: image is locked" in stderr
    assert "step 4: image is unlocked" in stderr


def test_a_part_locked_to_the_end_has_no_moments_and_no_dropout(tmp_path):
    two = run(tmp_path, Tower("image", locked_until=1.0), weight_decay=0.5)
    assert moves(two, "image") == [False] * 10
    assert not two.model["image"].training
    assert two.model["text"].training
    path, _ = Checkpoints(tmp_path, 1).newest()
    moments = torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert len(moments) == 4  # weights and biases of the two layers of the text tower


def test_one_step_of_adam_is_as_long_as_the_parts_rate(tmp_path):
    """The first step of Adam moves every weight by its learning rate, whatever the gradient."""
    config = {"steps": 1, "lr": 1e-2, "weight_decay": 0.0, "clip": None}
    two = Two(dropout=0.0)
    two.forward = lambda batch, clock, forward=two.forward: forward(batch, Clock())
    fit(two, Numbers(), quick(**config, warmup_steps=0, towers=[Tower("image", lr_scale=0.1)]), out=tmp_path)
    for name, value in two.model.named_parameters():
        moved = (value - two.history[0][name]).abs()
        rate = 1e-3 if name.startswith("image") else 1e-2
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)


def test_a_tower_that_changes_nothing_changes_nothing(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", Tower("image"))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_stopped_around_the_unlocking_continues_to_the_bit(tmp_path, stop):
    towers = Tower("image", locked_until=0.4, lr_scale=0.5), Tower("text[2:]", locked_until=0.8)
    whole = run(tmp_path / "a", *towers)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "b", *towers, stop=stop)
    again = run(tmp_path / "b", *towers)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def in_processes(out: str, world_batch: int) -> None:
    two = Two(dropout=0.0)
    towers = [Tower("image", locked_until=0.3)]
    fit(two, Numbers(), quick(steps=10, batch_size=world_batch, towers=towers), out=out)
    assert moves(two, "image") == [False] * 3 + [True] * 7


def test_two_processes_that_unlock_are_one(tmp_path):
    """Each process averages the gradients of a part that was locked when they were connected."""
    in_processes(str(tmp_path / "one"), 8)
    arguments = {"module": "test_towers", "function": "in_processes", "out": str(tmp_path / "two"), "world_batch": 4}
    statuses = the_zygote().run(tmp_path / "log", world=2, **arguments)
    assert statuses == [0, 0], (tmp_path / "log-0").read_text()
    one, two = ([line["loss"] for line in curve(tmp_path / name).values()] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ([Tower("vision")], "no part 'vision'; its parts are image, text"),
        ([Tower("image.0[0:1]")], "no part 'image.0"),
        ([Tower("text[7:]")], r"part 'text\[7:\]' has no weights"),
        ([Tower("image"), Tower("image.0")], "weights in common"),
        ([Tower("image", 0.5), Tower("text", 1.0)], "nothing is left to train"),
    ],
)
def test_towers_that_cannot_be_are_refused(towers, message):
    with pytest.raises(ValueError, match=message):
        TowerSchedule(Two(), towers)


@pytest.mark.parametrize("values", [{"locked_until": 1.5}, {"locked_until": float("nan")}, {"lr_scale": 0.0}])
def test_numbers_out_of_range_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Tower("image", **values)
