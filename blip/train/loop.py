"""The training loop: one for every objective, and bit-exact when a run is stopped and continued.

No random state is saved: dropout and sampling are functions of (seed, step, process, forward pass), the data a
function of the position in the stream. The weights, the optimizer's moments and three counters are the whole state.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from blip import dist, files
from blip.errors import DataError, Stopped, StuckSample, is_out_of_memory
from blip.lock import RunLock, RunLocked, only_writer
from blip.nn import host
from blip.objectives.batch import Batch
from blip.objectives.objective import Clock, Objective
from blip.train import drift, log, optim
from blip.train.memory import give_back_freed_memory, keep_freed_memory
from blip.train.precision import CastOnce, all_multiply_bfloat16, precision
from blip.train.settings import TrainConfig
from blip.train.signals import Stopper
from blip.train.state import Checkpoints, State, restore
from blip.train.towers import TowerSchedule


class Data(Protocol):
    """An endless stream of pairs, cut into batches of which each process reads its own."""

    def __len__(self) -> int:
        """Pairs in one epoch."""

    def batches(self, start: int, count: int, rank: int, world: int, batch_size: int) -> Iterable[Batch]:
        """Batches `start` to `start + count` - 1 of this process, each of exactly `batch_size` pairs."""

    def leave_out(self, keys: frozenset[str]) -> None:
        """Replace the samples with these keys unread; called before `batches`, and only if the ledger lists any."""


class RecordsBadSamples(Protocol):
    """A ledger of samples that could not be read."""

    def add(self, bad: list[Any], seen: int) -> None:
        """Note the bad samples of a batch; this process has drawn `seen` samples since it started."""

    # Optional: `left_out`, keys of samples that are not to be decoded, and `leave_out(key, reason)`, which adds one.


@dataclass(frozen=True)
class Result:
    """Where a run ended."""

    steps: int
    """Optimizer steps done."""
    samples: int
    """Pairs seen."""
    losses: dict[str, float]
    """Mean losses of the last log line."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Results of the last evaluation."""


class TrainingInterrupted(SystemExit):
    """The run stopped on request after saving; the same command continues it. Exit status 75."""

    def __init__(self) -> None:
        super().__init__(75)


class NonFinite(Stopped):
    """A loss or gradient was not finite; the weights were not updated."""


class TrainingOutOfMemory(Stopped):
    """The device or the machine ran out of memory."""


class LostPeer(Stopped):
    """Another process of the run died or hangs."""


def fit(
    objective: Objective,
    data: Data,
    config: TrainConfig,
    *,
    out: Path | str,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    settings: dict[str, Any] | None = None,
    fingerprint: str = "",
    remote_files: dict[str, list[Any]] | None = None,
    ledger: RecordsBadSamples | None = None,
) -> Result:
    """Train an objective, continuing from the newest whole checkpoint in `out` if there is one.

    `objective(batch, clock)` returns named losses, which are summed; `objective.after_step(carries)` follows each
    update; `objective.untrained()` names the parameters that no loss depends on. `evaluate` is called in every process,
    in evaluation mode and without gradients, and the main process's numbers count. `settings` (the whole run's) and
    `fingerprint` (of the data) must be the same when a run continues; `remote_files`, size and tag by address, are
    named if they are why it is not.

    Raises ValueError for settings that cannot work or differ from the run in `out`, RunLocked if another process
    writes there, NonFinite, TrainingOutOfMemory, LostPeer and files.WriteError as their names say, and
    TrainingInterrupted (exit status 75) after SIGTERM, SIGUSR1 or SIGINT, once the state is saved.
    """
    notes = dist.set_aside()
    log.check_trackers(config.trackers)
    if len(data) == 0:
        raise ValueError("there are no pairs to train on")
    dist.start(config.timeout)
    keep_freed_memory()
    out = Path(out)
    if out.is_file():
        raise ValueError(f"{out} is a file; give the name of a directory for the run")
    settings = {"train": vars(config)} if settings is None else settings
    with only_writer(out) as lock, Stopper() as stopper, _explained(config):
        run = _Run(objective, data, config, out, evaluate, settings, fingerprint, remote_files, ledger, stopper, lock)
        for note in notes:
            run.progress.say(note)
        try:
            return run.train()
        finally:
            run.close()


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        objective: Objective,
        data: Data,
        config: TrainConfig,
        out: Path,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        settings: dict[str, Any],
        fingerprint: str,
        remote_files: dict[str, list[Any]] | None,
        ledger: RecordsBadSamples | None,
        stopper: Stopper,
        lock: RunLock | None,
    ) -> None:
        self.objective, self.data, self.config, self.out = objective, data, config, out
        self.evaluate, self.ledger, self.stopper, self.lock = evaluate, ledger, stopper, lock
        self.world, self.rank = dist.world(), dist.rank()
        self.drawn = 0
        self.pairs_per_step = config.batch_size * config.accumulate * self.world
        self.steps_per_epoch = len(data) / self.pairs_per_step
        # Minus a hair, so that rounding does not add a step to a whole number of steps.
        self.total = config.steps or max(1, math.ceil(config.epochs * self.steps_per_epoch - 1e-9))

        # Here, so that a recipe with a wrong option ends before accelerate is imported, which is slow.
        from accelerate import Accelerator
        from accelerate.utils import DistributedType

        self.accelerator = Accelerator(
            cpu=dist.on_cpu(),  # without it accelerate leaves several processes on CPU unsynchronised
            mixed_precision="no",
            dynamo_backend="no",
            log_with=config.trackers or None,
            project_dir=out,
        )
        allowed = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if self.accelerator.distributed_type not in allowed:
            raise ValueError(f"{self.accelerator.distributed_type} is not supported: launch with torchrun")
        self.device = self.accelerator.device
        self.dtype = precision(config, self.device)
        objective.to(self.device).train()
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.towers = TowerSchedule(objective, config.towers)
        scales, bfloat16 = self.towers.scales(), all_multiply_bfloat16(self.device)
        self.optimizer = optim.build(objective, config, scales, bfloat16=bfloat16)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # On a CPU, where an operation costs no launch, autocast's own casts are as fast.
        casts = self.device.type == "cuda" and self.dtype != torch.float32
        self.cast_once = CastOnce(objective, self.dtype).used if casts else nullcontext

        layout = {"world": self.world, "batch_size": config.batch_size, "accumulate": config.accumulate}
        self.facts = {
            "settings": drift.plain(settings),
            "fingerprint": fingerprint,
            **({"remote_files": remote_files} if remote_files else {}),
            "layout": layout,
            "versions": drift.versions(),
        }
        self.checkpoints = Checkpoints(out, config.keep_checkpoints)
        self.state = self._restore()
        if config.compile:
            objective.compile()
        self.module: nn.Module | None = None  # until the first step
        self._open_logs(layout)

    def _restore(self) -> State:
        """Choose a checkpoint in the main process and load it in all processes."""
        path = newest = refusal = None
        if dist.is_main():
            path, newest = self.checkpoints.newest() or (None, None)
            if newest and not self.config.allow_change:
                try:
                    drift.refuse_drift(newest, self.facts, path)
                except ValueError as error:
                    refusal = str(error)
            if refusal is None:
                self.checkpoints.discard_after(path)
        path, newest, refusal = dist.from_main((path, newest, refusal))
        if refusal:
            raise ValueError(refusal)
        if path is None:
            return State()
        saved = restore(path, self.objective)
        chosen = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, values in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(values)
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        return State(**{name: newest[name] for name in State.__dataclass_fields__})

    def _connect(self) -> None:
        """Connect the processes: the gradients of what learns now are averaged while they are computed."""
        self.module, self.learning = self.objective, {}
        if self.world == 1:
            return
        untrained = self.objective.untrained()
        learning = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        self.learning = {name: p for name, p in learning.items() if name not in untrained}
        replicated = nn.parallel.DistributedDataParallel
        replicated._set_params_and_buffers_to_ignore_for_model(self.objective, untrained)
        device_ids = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # The new name of `broadcast_buffers` is unknown to the oldest torch we support.
            warnings.simplefilter("ignore", FutureWarning)
            self.module = replicated(
                self.objective, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # Its buckets change after the first backward pass, and with them the order of sums over three processes and
        # more. So this pass is made here: a run that continues adds up as one that was not interrupted.
        self.module.module = _Sum(self.learning.values())
        self.module().backward()
        self.module.module = self.objective
        self.optimizer.zero_grad(set_to_none=True)

    def _open_logs(self, layout: dict[str, int]) -> None:
        state, config = self.state, self.config
        self.window = log.Window(state.window)
        self.pace = {"seconds": 0.0, "waited": 0.0, "samples": 0.0, "tokens": 0.0}
        self.alarms = log.Alarms(config.warmup_steps)
        self.metrics: log.Metrics | None = None
        lines: list[dict[str, Any]] = []
        if dist.is_main():
            drift.describe_run(self.out, self.facts["settings"], layout, f"{self.device} {self.dtype}")
            self.metrics = log.Metrics(self.out / "metrics.jsonl", state.step)
            lines = self.metrics.lines_before
        self.progress = log.TrainingProgress(self.total, state.step, dist.is_main())
        if state.step:
            self.progress.say(f"continuing after step {state.step} of {self.total} in {self.out}")
        evaluated = [line for line in lines if "eval" in line]
        logged = [line["losses"] for line in lines if "losses" in line]
        last = evaluated[-1] if evaluated else {"step": None, "eval": {}}
        self.evaluated, self.scores, self.losses = dist.from_main((last["step"], last["eval"], (logged or [{}])[-1]))
        if config.trackers:
            flat = drift.flatten(self.facts["settings"])
            values = {k: v if isinstance(v, str | int | float | bool) else str(v) for k, v in flat.items()}
            self.accelerator.init_trackers("openblip", config=values)

    def train(self) -> Result:
        """Run the remaining steps, with log lines, checkpoints and evaluations."""
        state, config = self.state, self.config
        self._evaluate_if_due()
        if state.step < self.total:
            with self._stream() as batches:
                while state.step < self.total:
                    stop = self._step(batches)
                    last = state.step == self.total
                    self.progress.advance()
                    if state.step % config.log_every == 0 or last:
                        self._log()
                    # Also before an evaluation, so that continuing never repeats what followed from its results.
                    if state.step % config.save_every == 0 or last or stop or self._evaluation_is_due():
                        self._save()
                    if stop:
                        self.progress.say(f"stopped and saved after step {state.step}; the same command continues")
                        raise TrainingInterrupted
                    self._evaluate_if_due()
        return Result(state.step, state.samples, self.losses, self.scores)

    @contextmanager
    def _stream(self) -> Iterator[Iterator[Batch]]:
        """Yield this process's batches from the current step to the end."""
        config = self.config
        # Counted in pairs, not steps, so that a run whose batch size changed continues at the same place in the data.
        start = self.state.samples // (config.batch_size * self.world)
        count = (self.total - self.state.step) * config.accumulate
        if left_out := getattr(self.ledger, "left_out", None):
            self.data.leave_out(left_out)
            self.progress.say(
                f"{len(left_out)} samples are left out because decoding them took too long (left_out in the run's "
                "bad_samples files); without these files the run is not reproducible"
            )
        batches = iter(self.data.batches(start, count, self.rank, self.world, config.batch_size))
        try:
            yield _enough(batches)
        except StuckSample as error:
            if self.ledger is None:
                raise
            self.ledger.leave_out(error.key, error.reason)
            raise DataError(
                f"{error}. It is left out from now on: the same command continues without it, and the run is not "
                "reproducible elsewhere"
            ) from None
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def _step(self, batches: Iterator[Batch]) -> bool:
        """Make one update; return whether any process received a request to stop."""
        began = time.monotonic()
        state = self.state
        clock = Clock(state.step, state.samples / len(self.data), state.step / self.total)
        rate = optim.learning_rate(state.step, self.config, self.steps_per_epoch, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        changes = self.towers.set(clock)
        for change in changes:
            self.progress.say(f"step {state.step}: {change}")
        if changes or self.module is None:
            self._connect()
        losses, health, carries, keys, numbers = self._forward_backward(batches, clock)

        self.scaler.unscale_(self.optimizer)
        self._refuse_untrained()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        sums = {"loss": sum(losses.values()), **losses, **health, "grad_norm": norm}
        means, (stop, waited, tokens) = self._share(sums, [float(self.stopper.stop_requested), *numbers])
        means["lr"] = rate

        nonfinite = [name for name in ("loss", *losses) if not math.isfinite(means[name])]
        if not math.isfinite(means["grad_norm"]) and not self._scale_is_settling():
            nonfinite.append("grad_norm")
        if nonfinite:
            self._refuse_update(nonfinite, sums, keys)
        else:
            self._update(norm, carries)
        self.optimizer.zero_grad(set_to_none=True)

        state.step += 1
        state.samples += self.pairs_per_step
        if not nonfinite:
            self.window.add({name: value for name, value in means.items() if math.isfinite(value)})
        seconds = time.monotonic() - began
        state.seconds += seconds
        for name, value in zip(self.pace, (seconds, waited, self.pairs_per_step, tokens * self.world), strict=True):
            self.pace[name] += value
        return stop > 0

    def _forward_backward(
        self, batches: Iterator[Batch], clock: Clock
    ) -> tuple[dict, dict, list[Any], list[str], list[float]]:
        """Compute gradients; return mean losses, health, carries, keys of the pairs, [seconds waited, tokens]."""
        config, state = self.config, self.state
        losses: dict[str, Tensor] = {}
        health: dict[str, Tensor] = {}
        carries, keys, numbers = [], [], [0.0, 0.0]
        for micro in range(config.accumulate):
            waiting = time.monotonic()
            batch = next(batches)
            numbers[0] += time.monotonic() - waiting
            numbers[1] += float(batch.keep.sum()) if hasattr(batch, "keep") else 0.0
            keys += batch.keys
            self.drawn += len(batch)
            if self.ledger is not None:
                self.ledger.add(batch.bad, self.drawn)
            torch.manual_seed(seed_of(config.seed, state.step, self.rank, micro))
            last = micro == config.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module), self.cast_once():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    outcome = self.module(batch.to(self.device), clock)
                self.scaler.scale(sum(outcome.losses.values()) / config.accumulate).backward()
            for into, values in ((losses, outcome.losses), (health, outcome.health)):
                for name, value in values.items():
                    share = value.detach().double() / config.accumulate
                    into[name] = into[name] + share if name in into else share
            carries.append(outcome.carry)
        return losses, health, carries, keys, numbers

    def _share(self, sums: dict[str, Tensor], numbers: list[float]) -> tuple[dict[str, float], list[float]]:
        """Average the device's scalars (by name) and the host's numbers over all processes in one exchange."""
        ours = torch.tensor(numbers, dtype=torch.float64).to(self.device, non_blocking=True)
        values = torch.cat([torch.stack([value.double() for value in sums.values()]), ours])
        (means,) = host.read(dist.total(values) / self.world)  # the only wait for the device in a step
        means = means.tolist()
        return dict(zip(sums, means, strict=False)), means[len(sums) :]

    def _refuse_untrained(self) -> None:
        """Raise ValueError if several processes wait for a gradient that is not computed."""
        missing = [name for name, p in self.learning.items() if p.grad is None]
        if missing:
            raise ValueError(
                f"no loss depends on {missing[0]} and {len(missing) - 1} more parameters of "
                f"{type(self.objective).__name__}: add their names to its `untrained`, or freeze them"
            )

    def _scale_is_settling(self) -> bool:
        """Whether an overflow is harmless: in float16 the scaler finds its scale that way, until it is down to 1."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def _update(self, norm: Tensor, carries: list[Any]) -> None:
        if self.config.clip is not None:
            clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:
            self.objective.after_step(carries)

    def _refuse_update(self, nonfinite: list[str], sums: dict[str, Tensor], keys: list[str]) -> None:
        """Record the pairs of a non-finite step, then stop, or skip it if `skip_nonfinite` allows one more."""
        state, config = self.state, self.config
        values = {name: str(float(value)) for name, value in sums.items()}
        everyone = dist.gather_objects({"process": self.rank, "values": values, "keys": keys})
        path = self.out / f"nonfinite-step-{state.step}.json"
        if dist.is_main():
            record = {"step": state.step, "not finite": nonfinite, "processes": everyone}
            files.replace_file(path, json.dumps(record, indent=1).encode())
        message = f"{', '.join(nonfinite)} not finite at step {state.step}; the pairs of the step are listed in {path}"
        if state.skipped >= config.skip_nonfinite:
            raise NonFinite(
                f"{message}. The weights are as before the step. Look at those pairs, lower train.lr, set train.clip, "
                f"use train.precision bfloat16 or float32, or allow some in train.skip_nonfinite ({state.skipped} of "
                f"{config.skip_nonfinite} skipped)"
            )
        state.skipped += 1
        if self.scaler.is_enabled():
            self.scaler.update()
        self.progress.say(f"{message}; skipped, {state.skipped} of {config.skip_nonfinite} allowed")

    def _log(self) -> None:
        state, pace = self.state, self.pace
        means = self.window.means()
        self.window = log.Window()
        seconds = max(pace["seconds"], 1e-9)
        wait = pace["waited"] / seconds
        speed = {"samples_per_s": pace["samples"] / seconds, "tokens_per_s": pace["tokens"] / seconds}
        self.pace = dict.fromkeys(pace, 0.0)
        self.losses = means
        epoch = state.samples / len(self.data)
        line = {"step": state.step, "epoch": epoch, "losses": means, **speed, "data_wait": wait}
        if self.metrics is not None:
            self.metrics.write({**line, "seconds": state.seconds, "skipped": state.skipped})
        if self.config.trackers:
            self.accelerator.log({**means, **speed, "epoch": epoch, "data_wait": wait}, step=state.step)
        give_back_freed_memory()
        self.progress.report(state.step, means, speed["samples_per_s"])
        for alarm in self.alarms.check(state.step, means, wait):
            self.progress.say(f"WARNING: {alarm}")

    def _save(self) -> None:
        """Write a checkpoint in the main process; all processes raise if that fails."""
        failure = None
        if self.metrics is not None:
            self.state.window = self.window.values
            self.metrics.sync()
            extra = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            try:
                self.lock.check()
                self.checkpoints.save(self.objective, extra, self.state, self.facts)
            except (files.WriteError, RunLocked) as error:
                failure = error
        failure = dist.from_main(failure)
        if failure:
            raise failure

    def _evaluation_is_due(self) -> bool:
        """Whether this step needs an evaluation that metrics.jsonl does not have yet."""
        step, every = self.state.step, self.config.eval_every
        if self.evaluate is None or self.evaluated == step or step == 0:
            return False
        before, after = (optim.whole_epochs(at, self.steps_per_epoch) for at in (step - 1, step))
        epoch_ends = self.config.eval_each_epoch and after > before
        return step == self.total or bool(every and step % every == 0) or epoch_ends

    def _evaluate_if_due(self) -> None:
        if not self._evaluation_is_due():
            return
        step = self.state.step
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        try:
            with torch.no_grad():
                scores = self.evaluate(self.objective)
        finally:
            for module, mode in modes:
                module.training = mode
        self.scores = dist.from_main({name: float(value) for name, value in scores.items()})
        self.evaluated = step
        if self.metrics is not None:
            self.metrics.write({"step": step, "epoch": self.state.samples / len(self.data), "eval": self.scores})
        if self.config.trackers:
            self.accelerator.log({f"eval/{name}": value for name, value in self.scores.items()}, step=step)
        listed = "  ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        self.progress.say(f"step {step}/{self.total}  evaluation  {listed}")

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


class _Sum(nn.Module):
    """The sum of parameters, in whose gradient all of them have a part."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.all = list(parameters)

    def forward(self) -> Tensor:
        return sum(p.sum() for p in self.all)


def _enough(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches; ValueError when the loop wants one more than there are."""
    yield from batches
    raise ValueError("the data ended before the run did: `batches` must yield `count` batches")


@contextmanager
def _explained(config: TrainConfig) -> Iterator[None]:
    """Turn an out-of-memory or lost-connection error into one that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise TrainingOutOfMemory(
                f"process {dist.rank()} ran out of memory with {config.batch_size} pairs per forward pass. The batch "
                "size is not lowered automatically, as the contrastive loss depends on it: lower train.batch_size (and "
                "raise train.accumulate), set model.checkpoint, or use train.precision bfloat16"
            ) from error
        if dist.lost_peer(error):
            raise LostPeer(
                f"process {dist.rank()} lost contact with another process, whose own message says why "
                f"(waited up to train.timeout, {config.timeout:.0f} s): {error}"
            ) from error
        raise


def seed_of(*numbers: int) -> int:
    """Hash whole numbers to a seed, different for each combination."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
