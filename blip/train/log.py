"""Logs of a run: metrics.jsonl, trackers, a progress line, and alarms in plain words."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from blip import files
from blip.installed import remedy
from blip.progress import LenientStream, clock

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""Names of trackers -> packages, one of which must be installed."""

CONSTANT_ITM = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
"""Matching loss of a head that ignores its input: one match to two mismatches, 0.6365."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise ValueError if a tracker is unknown or its package is missing; called before anything else is done."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"train.trackers: {name!r} is not one of {', '.join(TRACKERS)}")
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise ValueError(
                f"train.trackers: {name} is not installed: {remedy(name)}, or leave it out (metrics.jsonl is always "
                "written)"
            )


class Window:
    """Running means since the last log line."""

    def __init__(self, values: dict[str, list[float]] | None = None) -> None:
        self.values = {name: list(pair) for name, pair in (values or {}).items()}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            pair = self.values.setdefault(name, [0.0, 0])
            pair[0] += value
            pair[1] += 1

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.values.items()}


class Metrics:
    """`metrics.jsonl`, one line per log step or evaluation: every step once, however often the run was interrupted."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for appending; lines after `step` are removed, as those steps will be repeated."""
        self.path = path
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        if path.exists():
            files.replace_file(path, b"".join(_line(line) for line in lines))
        self.lines_before = lines
        self._file = path.open("ab")

    def write(self, values: dict[str, Any]) -> None:
        with files.explain_write(self.path, 1):
            self._file.write(_line(values))
            self._file.flush()

    def sync(self) -> None:
        """Flush to disk, before a checkpoint that relies on these lines."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, without a line that a killed process left incomplete."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and "step" in values:
            lines.append(values)
    return lines


class TrainingProgress:
    """A bar on a terminal, plain lines elsewhere; shown by the main process only."""

    def __init__(self, total: int, step: int, show: bool, stream: TextIO | None = None) -> None:
        # The launcher that reads these lines may end first; the run's state matters more.
        self.stream = LenientStream(stream or sys.stderr)
        self.total, self.show = total, show
        self.started, self.first = time.monotonic(), step
        self.bar: tqdm | None = None
        if show and self.stream.isatty():
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, file=self.stream)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def report(self, step: int, losses: dict[str, float], samples_per_second: float) -> None:
        """Show one log line: losses, speed, and the time left at the average pace since the start."""
        values = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        speed = f"{samples_per_second:.1f} samples/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{values}  {speed}")
            return
        pace = (time.monotonic() - self.started) / max(1, step - self.first)
        self.say(f"step {step}/{self.total}  {values}  {speed}  {clock(pace * (self.total - step))} left")

    def say(self, text: str) -> None:
        if not self.show:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Alarms:
    """Warnings about numbers that mean trouble; each is raised once per occurrence.

    `windows` log lines in a row must agree: the matching loss within 0.5% of what a head that ignores its input gets
    (counted once the warm-up is over), or more than half of the time spent waiting for data.
    """

    def __init__(self, warmup_steps: int, windows: int = 3) -> None:
        self.warmup_steps, self.windows = warmup_steps, windows
        self.stuck = self.starved = 0

    def check(self, step: int, losses: dict[str, float], data_wait: float) -> list[str]:
        """Return the alarms that a log line raises; `data_wait` is a share of time, 0 to 1."""
        constant = step > self.warmup_steps and abs(losses.get("itm", 0.0) / CONSTANT_ITM - 1) <= 0.005
        self.stuck = self.stuck + 1 if constant else 0
        self.starved = self.starved + 1 if data_wait > 0.5 else 0
        raised = []
        if self.stuck == self.windows:
            raised.append(
                f"the matching loss has stayed at {losses['itm']:.4f}, what a head that ignores image and text gets "
                f"({CONSTANT_ITM:.4f}): the matching head is not learning. Look at the captions and the learning rate"
            )
        if self.starved == self.windows:
            raised.append(
                f"{data_wait:.0%} of the time goes into waiting for data: raise data.workers, store smaller images, "
                "or put the data on a faster disk"
            )
        return raised
