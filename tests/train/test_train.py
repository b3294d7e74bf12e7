"""The loop: what it adds up, what it refuses, and that looking at a run does not change it."""

import dataclasses
import json
import platform
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from stub_run import Fault, Numbers, Stub, curve, quick, the_zygote
from torch import nn

from blip.data.ledger import Ledger
from blip.errors import DataError, StuckSample
from blip.objectives.batch import Bad
from blip.objectives.objective import Clock, Objective
from blip.train import optim
from blip.train.loop import NonFinite, TrainingOutOfMemory, fit, seed_of
from blip.train.memory import give_back_freed_memory, keep_freed_memory
from blip.train.precision import multiplies_bfloat16, precision
from blip.train.settings import TrainConfig
from blip.train.state import Checkpoints
from recipes.building import ModelChoice


@pytest.fixture
def zygote():
    return the_zygote()


class Outcome(NamedTuple):
    losses: dict
    health: dict
    carry: object = None


class Plain(Objective):
    """A mean over the batch and nothing random, so that batches add up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(12, 4)
        self.unused = nn.Linear(2, 2)
        self.epochs: list[float] = []
        self.steps = 0

    def forward(self, batch, clock):
        self.epochs.append(clock.epoch)
        return Outcome({"square": self.layer(batch.image.flatten(1)).square().mean()}, {})

    def untrained(self):
        return {"unused.weight", "unused.bias"}

    def after_step(self, carries):
        self.steps += 1
        self.carries = len(carries)


def losses(out) -> list[float]:
    return [values["loss"] for values in curve(out).values()]


def plain_run(out: str, world_batch: int = 4, size: int = 32, steps: int = 6, accumulate: int = 1) -> Plain:
    model = Plain()
    fit(model, Numbers(size), quick(steps=steps, batch_size=world_batch, accumulate=accumulate), out=out)
    return model


def test_two_halves_are_one_batch(tmp_path):
    whole, halves = plain_run(tmp_path / "a", 8), plain_run(tmp_path / "b", 4, accumulate=2)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)
    torch.testing.assert_close(whole.layer.weight, halves.layer.weight)
    assert (whole.steps, whole.carries) == (6, 1)
    assert (halves.steps, halves.carries) == (6, 2)
    assert whole.epochs == [8 * step / 32 for step in range(6)]


def test_two_processes_are_one_batch_even_with_untrained_parameters(zygote, tmp_path):
    plain_run(tmp_path / "one", 8)
    for name, batch, accumulate in (("two", 4, 1), ("both", 2, 2)):
        statuses = zygote.run(
            tmp_path / "log",
            world=2,
            module="test_train",
            function="plain_run",
            out=str(tmp_path / name),
            world_batch=batch,
            accumulate=accumulate,
        )
        assert statuses == [0, 0], (tmp_path / "log-0").read_text()
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


class Forgetful(Plain):
    """Does not say that it leaves a layer out."""

    def untrained(self):
        return set()


def forgetful_run(out: str) -> None:
    fit(Forgetful(), Numbers(), quick(steps=2), out=out)


def test_a_gradient_that_never_comes_is_refused_in_two_processes(zygote, tmp_path):
    arguments = {"module": "test_train", "function": "forgetful_run", "out": str(tmp_path / "out")}
    assert zygote.run(tmp_path / "log", world=2, **arguments) == [1, 1]
    for rank in "01":
        assert "no loss depends on unused.weight and 1 more" in (tmp_path / f"log-{rank}").read_text()


def test_the_model_learns(tmp_path):
    fit(Plain(), Numbers(4), quick(steps=60), out=tmp_path)
    assert losses(tmp_path)[-1] < 0.2 * losses(tmp_path)[0]


def test_epochs_set_the_number_of_steps(tmp_path):
    assert fit(Plain(), Numbers(10), quick(epochs=3), out=tmp_path).steps == 8  # 30 pairs in fours
    assert fit(Plain(), Numbers(1), quick(epochs=1), out=tmp_path / "one").steps == 1


def test_evaluation_does_not_disturb_training(tmp_path):
    def evaluate(objective):
        assert not objective.training
        assert not torch.is_grad_enabled()
        torch.manual_seed(5), random.random(), np.random.rand(), torch.rand(100)
        objective(Numbers().batch([0, 1, 2]), Clock())
        return {"score": torch.tensor(0.5)}

    stub = Stub()
    stub.teacher.eval()
    result = fit(stub, Numbers(), quick(steps=10, eval_every=3), out=tmp_path / "a", evaluate=evaluate)
    assert result.metrics == {"score": 0.5}
    assert stub.training
    assert stub.student.training
    fit(Stub(), Numbers(), quick(steps=10), out=tmp_path / "b")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [3, 6, 9, 10]


def test_log_and_save_do_not_disturb_training(tmp_path):
    a = fit(Stub(), Numbers(), quick(steps=8, log_every=8), out=tmp_path / "a")
    b = fit(Stub(), Numbers(), quick(steps=8, save_every=2, log_every=8), out=tmp_path / "b")
    assert a == b


# Not a number


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_not_a_number_in_one_process_stops_all_before_the_update(zygote, tmp_path, kind):
    out = tmp_path / "out"
    arguments = {"out": str(out), "steps": 9, "fault": {"kind": kind, "rank": 1, "step": 3}}
    assert zygote.run(tmp_path / "log", world=2, **arguments) == [1, 1]
    for rank in (0, 1):
        assert (out / f"weights-{rank}").read_text() == "unchanged"
        assert "NonFinite" in (tmp_path / f"log-{rank}").read_text()
    record = json.loads((out / "nonfinite-step-3.json").read_text())
    assert record["not finite"] == (["loss", "lm"] if kind == "loss" else []) + ["grad_norm"]
    assert record["processes"][1]["keys"] == [f"pair:{i}" for i in range(28, 32)]
    assert record["processes"][0]["keys"] == [f"pair:{i}" for i in range(24, 28)]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_weights_are_bitwise_unchanged_in_one_process(tmp_path, kind):
    stub = Stub(fault=Fault(kind, step=2))
    with pytest.raises(NonFinite, match=r"step 2; the pairs of the step are listed in .*nonfinite-step-2\.json"):
        fit(stub, Numbers(), quick(steps=9), out=tmp_path)
    assert all(torch.equal(value, stub.fault.seen[name]) for name, value in stub.state_dict().items())
    assert not Checkpoints(tmp_path, 2).paths()


def test_a_budget_of_skipped_updates_is_kept_over_a_restart(tmp_path):
    options = {"steps": 9, "skip_nonfinite": 1, "save_every": 4}
    fit(Stub(fault=Fault("loss", step=2)), Numbers(), quick(**options), out=tmp_path)
    _, state = Checkpoints(tmp_path, 2).newest()
    assert state["skipped"] == 1
    assert state["step"] == 9
    for path in Checkpoints(tmp_path, 2).paths()[1:]:
        (path / "state.json").unlink()
    with pytest.raises(NonFinite, match="1 of 1 skipped"):
        fit(Stub(fault=Fault("loss", step=0)), Numbers(), quick(**options), out=tmp_path)


# Other processes, memory, data


def test_out_of_memory_in_one_process_ends_all_with_a_hint(zygote, tmp_path):
    pids = zygote.spawn(
        tmp_path / "log", world=2, out=str(tmp_path / "out"), steps=9, fault={"kind": "memory", "rank": 1, "step": 2}
    )
    assert [zygote.wait(pid, 60) for pid in pids] == [1, 1]
    assert "lower train.batch_size" in (tmp_path / "log-1").read_text()
    assert "LostPeer" in (tmp_path / "log-0").read_text()


def test_a_file_is_no_place_for_a_run(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"out is a file; give the name of a directory"):
        fit(Stub(), Numbers(), quick(steps=4), out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_out_of_memory_alone(tmp_path):
    with pytest.raises(TrainingOutOfMemory, match=r"4 pairs per forward pass.*train\.accumulate") as stop:
        fit(Stub(fault=Fault("memory", step=1)), Numbers(), quick(steps=4), out=tmp_path)
    for name in re.findall(r"(?:train|model)[.][\w.]*\w", str(stop.value)):
        section, _, option = name.partition(".")
        options = dataclasses.fields(TrainConfig if section == "train" else ModelChoice)
        assert option in {field.name for field in options}, f"{name} is no option"


def test_a_dead_process_is_noticed(zygote, tmp_path):
    arguments = {"out": str(tmp_path / "out"), "steps": 9, "fault": {"kind": "die", "rank": 1, "step": 2}}
    assert zygote.run(tmp_path / "log", world=2, **arguments) == [1, -9]
    assert "lost contact with another process" in (tmp_path / "log-0").read_text()


def all_sizes(out: str) -> None:
    for size in (1, 3, 4, 5, 31):
        data = Numbers(size)
        fit(Stub(), data, quick(epochs=2), out=f"{out}/{size}")
        assert all(len(keys) == 4 for keys in data.seen)


@pytest.mark.parametrize("world", [1, 2])
def test_any_number_of_pairs_fits_any_batch(zygote, tmp_path, world):
    arguments = {"module": "test_train", "function": "all_sizes", "out": str(tmp_path)}
    assert zygote.run(tmp_path / "log", world=world, **arguments) == [0] * world, (tmp_path / "log-0").read_text()


def test_no_pairs_and_too_few_batches_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no pairs"):
        fit(Stub(), Numbers(0), quick(steps=4), out=tmp_path / "a")

    class Short(Numbers):
        def batches(self, start, count, rank, world, batch_size):
            return super().batches(start, 2, rank, world, batch_size)

    with pytest.raises(ValueError, match="data ended before the run"):
        fit(Stub(), Short(), quick(steps=4), out=tmp_path / "b")


def test_bad_samples_reach_the_ledger_with_the_count_of_all_seen(tmp_path):
    class Ledger:
        calls = []  # noqa: RUF012

        def add(self, bad, seen):
            self.calls.append(([b.key for b in bad], seen))

    class Spoiled(Numbers):
        def batch(self, indices):
            batch = super().batch(indices)
            batch.bad = [Bad("x", "torn")] if 4 in indices else []
            return batch

    fit(Stub(), Spoiled(), quick(steps=3), out=tmp_path, ledger=Ledger())
    assert Ledger.calls == [([], 4), (["x"], 8), ([], 12)]


def test_a_sample_that_decoding_got_stuck_at_is_left_out_by_the_next_start(tmp_path, capsys):
    class Stuck(Numbers):
        keys = frozenset()

        def batch(self, indices):
            if 9 in indices and "nine" not in self.keys:
                raise StuckSample("worker 0 is stuck at nine", "nine", "60 s")
            return super().batch(indices)

        def leave_out(self, keys):
            self.keys = keys

    def ledger():
        return Ledger(tmp_path / "bad_samples-0.jsonl")

    with pytest.raises(DataError, match=r"stuck at nine\. It is left out from now on: the same command"):
        fit(Stub(), Stuck(), quick(steps=3), out=tmp_path, ledger=ledger())
    assert ledger().left_out == {"nine"}
    assert fit(Stub(), Stuck(), quick(steps=3), out=tmp_path, ledger=ledger()).steps == 3
    assert "not reproducible" in "".join(capsys.readouterr())


# Precision, seeds, memory


def test_precision():
    cpu = torch.device("cpu")
    assert precision(quick(), cpu) == torch.float32
    assert precision(quick(precision="bfloat16"), cpu) == torch.bfloat16
    wanted = torch.bfloat16 if multiplies_bfloat16(cpu) else torch.float32
    assert precision(quick(precision="auto"), cpu) == wanted
    with pytest.raises(ValueError, match="float16 needs a CUDA device"):
        precision(quick(precision="float16"), cpu)


def test_bfloat16_that_onednn_may_not_use_is_not_there(tmp_path, monkeypatch):
    """As with ONEDNN_MAX_CPU_ISA, where it is emulated; Muon then takes float32, too, in all processes."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not multiplies_bfloat16(torch.device("cpu"))
    built, build = [], optim.build
    monkeypatch.setattr(optim, "build", lambda *args, **options: built.append(options) or build(*args, **options))
    fit(Plain(), Numbers(), quick(steps=1), out=tmp_path)
    assert built == [{"bfloat16": False}]


def test_bfloat16_trains_and_differs_from_float32(tmp_path):
    for name in ("float32", "bfloat16"):
        fit(Plain(), Numbers(), quick(steps=5, precision=name), out=tmp_path / name)
    a, b = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    assert a != b
    assert a == pytest.approx(b, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_gpu_run_continues_to_the_bit(tmp_path, name):
    options = {"steps": 10, "precision": name, "save_every": 5}
    fit(Stub(), Numbers(), quick(**options), out=tmp_path / "a")
    with pytest.raises(SystemExit):
        fit(Stub(fault=Fault("stop", step=5)), Numbers(), quick(**options), out=tmp_path / "b")
    fit(Stub(), Numbers(), quick(**options), out=tmp_path / "b")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


@pytest.mark.slow
def test_compiled(tmp_path):
    fit(Plain(), Numbers(), quick(steps=4), out=tmp_path / "a")
    fit(Plain(), Numbers(), quick(steps=4, compile=True), out=tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def test_seeds_differ_for_every_place():
    seeds = {seed_of(0, step, rank, micro) for step in range(20) for rank in range(4) for micro in range(3)}
    assert len(seeds) == 240
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_freed_memory_is_kept_where_the_c_library_listens():
    assert isinstance(keep_freed_memory(), bool)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep and to give back")
def test_holes_of_freed_memory_are_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    assert keep_freed_memory()
    blocks = [torch.ones(1_000_000) for _ in range(100)]
    last = blocks.pop()
    blocks.clear()
    kept = resident()
    assert give_back_freed_memory()
    assert resident() < kept - 300e6
    assert last.sum() == 1_000_000


def test_what_accelerate_is_told_to_compile_stays_as_it_is(tmp_path, monkeypatch, capsys):
    fit(Plain(), Numbers(), quick(steps=4), out=tmp_path / "a")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    fit(Plain(), Numbers(), quick(steps=4), out=tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert "ACCELERATE_DYNAMO_BACKEND=EAGER of accelerate's configuration is set aside" in capsys.readouterr().err
