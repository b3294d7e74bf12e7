"""Long work in stages: each is done once, by one of the processes that share a folder.

A finished stage has a `stage.json` in its folder, with its results and a fingerprint of its settings and of the stages
that it needs. If a process is killed, the next one that runs the same command takes over its stage.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip import files
from blip.lock import RunLock, RunLocked
from blip.train import drift

RECORD = "stage.json"
LOCKS = "locks"
"""Folder of the locks; one is held while its stage is in progress."""
_POLL = 2.0
"""Seconds between checks whether another process has finished the stage waited for."""


@dataclass(frozen=True)
class Stage:
    """One piece of work with a folder of its own."""

    name: str
    """Name of the stage, and of its folder."""
    work: Callable[[Path], dict[str, Any]]
    """Function that does the work in the stage's folder, resuming an earlier attempt; returns results for JSON."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that the results depend on, besides the stages needed."""
    needs: tuple[str, ...] = ()
    """Names of the stages that must be done before this one."""
    cost: float = 1.0
    """Expected duration in seconds."""


class Stages:
    """Stages of one folder, in an order in which they can be done."""

    def __init__(self, out: Path, stages: Sequence[Stage], say: Callable[[str], None] = print) -> None:
        """Check the order; ValueError for a stage that needs one that does not come before it."""
        self.out, self.say = out, say
        self.stages: dict[str, Stage] = {}
        self.fingerprints: dict[str, str] = {}
        for stage in stages:
            if missing := [need for need in stage.needs if need not in self.stages]:
                raise ValueError(f"stage {stage.name} needs {', '.join(missing)}, not listed before it")
            self.stages[stage.name] = stage
            parts = [drift.plain(stage.settings), [self.fingerprints[need] for need in stage.needs]]
            self.fingerprints[stage.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def record(self, name: str) -> dict[str, Any] | None:
        """Read a finished stage's record: `results`, `seconds`, `settings`, `fingerprint`; None if not finished.

        ValueError, listing the differences, if it was done with other settings.
        """
        path = self.out / name / RECORD
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}): remove {path.parent} to repeat the stage") from None
        if record["fingerprint"] != self.fingerprints[name]:
            lines = drift.drift(record["settings"], self.stages[name].settings) or ["a stage that it needs differs"]
            raise ValueError(
                f"{path.parent} was made with other settings: {'; '.join(lines)}. Restore those settings, choose "
                "another --out, or remove that folder and everything made from it"
            )
        return record

    def done(self, names: Sequence[str]) -> bool:
        return all(self.record(name) for name in names)

    def results(self, name: str) -> dict[str, Any]:
        """The results of a finished stage; ValueError if it is not finished."""
        record = self.record(name)
        if record is None:
            raise ValueError(f"stage {name} of {self.out} is not done")
        return record["results"]

    def carry_out(self, after_each: Callable[[], None] = lambda: None) -> None:
        """Do the stages that are left, and wait for those of other processes; calls `after_each` after each stage."""
        began, first = time.monotonic(), self._left()
        if first:
            done, cost = len(self.stages) - len(first), self._cost(first)
            self.say(f"{done} of {len(self.stages)} stages are done; the rest take about {_time(cost)} on 2 cores")
        waiting = ""
        while left := self._left():
            gone, total = time.monotonic() - began, self._cost(first)
            finished = total - self._cost(left)
            eta = self._cost(left) * (gone / finished if finished > 0.02 * total else 1.0)
            if self._do_one(left, eta):
                waiting = ""
                after_each()
            else:
                if waiting != left[0]:
                    waiting = left[0]
                    self.say(f"waiting for {waiting}, which another process is doing; about {_time(eta)} left")
                time.sleep(_POLL)

    def _left(self) -> list[str]:
        return [name for name in self.stages if self.record(name) is None]

    def _cost(self, names: Sequence[str]) -> float:
        return sum(self.stages[name].cost for name in names)

    def _do_one(self, left: Sequence[str], eta: float) -> bool:
        """Do the first stage whose needs are met and that no other process is doing; False if there is none."""
        for name in left:
            stage = self.stages[name]
            if any(need in left for need in stage.needs):
                continue
            with ExitStack() as stack:
                try:
                    stack.enter_context(RunLock(self.out / LOCKS / name))
                except RunLocked:
                    continue
                if self.record(name) is None:  # not finished by another process in the meantime
                    number = list(self.stages).index(name) + 1
                    self.say(
                        f"stage {number} of {len(self.stages)}: {name} (about {_time(stage.cost)}; "
                        f"{len(self.stages) - len(left)} done, about {_time(eta)} left)"
                    )
                    self._do(stage)
            return True
        return False

    def _do(self, stage: Stage) -> None:
        folder, began = self.out / stage.name, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        results = stage.work(folder)
        record = {
            "fingerprint": self.fingerprints[stage.name],
            "settings": drift.plain(stage.settings),
            "seconds": round(time.monotonic() - began, 1),
            "results": results,
        }
        files.replace_file(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # no longer needed to resume


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
