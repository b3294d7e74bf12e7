"""The progress of a run and its checkpoints, from which it continues as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip import files
from blip.tensors import read_pickled_tensors, read_tensors, tensor_bytes, write_tensors

logger = logging.getLogger(__name__)


@dataclass
class State:
    """Counters of a run."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Pairs seen."""
    skipped: int = 0
    """Updates skipped because a loss or gradient was not finite."""
    seconds: float = 0.0
    """Time spent in steps."""
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sums and counts of the values that the next log line averages."""


class Checkpoints:
    """Checkpoints in `out/checkpoints/step-00001000/`: each complete or absent, the newest few kept."""

    def __init__(self, out: Path, keep: int) -> None:
        self.folder, self.keep = out / "checkpoints", keep

    def paths(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def save(self, objective: nn.Module, extra: dict[str, Any], state: State, facts: dict[str, Any]) -> Path:
        """Write the state of a run, then remove old checkpoints. `extra`: state dicts of optimizer and scaler.

        files.WriteError if the disk is full: nothing is left behind and older checkpoints are untouched.
        """
        target = self.folder / f"step-{state.step:08d}"
        if target.exists():
            return target
        tensors = objective.state_dict()
        text = json.dumps({**dataclasses.asdict(state), **facts}, indent=1).encode()
        writers = {
            "objective.safetensors": (partial(write_tensors, tensors=tensors), tensor_bytes(tensors)),
            "optimizer.pt": (partial(_torch_save, extra), _nested_bytes(extra)),
            "state.json": (partial(_write, text), len(text)),
        }
        files.write_directory(target, writers, {"format": "openblip training state", "version": 1})
        self._prune(target)
        return target

    def _prune(self, newest: Path) -> None:
        older = [path for path in self.paths() if path != newest]
        for path in older[: max(0, len(older) + 1 - self.keep)]:
            files.checkpoint_event("before prune", path)
            # Without its manifest it is no checkpoint, however far the removal gets.
            (path / files.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            files.checkpoint_event("after prune", path)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Find the newest undamaged checkpoint -> its path and the contents of its state.json."""
        for path in reversed(self.paths()):
            try:
                files.check_manifest(path)
                return path, json.loads((path / "state.json").read_bytes())
            except PermissionError:  # it may be intact: skipping it would throw work away
                raise
            except (OSError, ValueError) as error:
                logger.warning("checkpoint %s is damaged and was skipped: %s", path.name, error)
        return None

    def discard_after(self, path: Path | None) -> None:
        """Rename damaged checkpoints newer than the one in use, and remove unfinished ones."""
        for folder in (self.folder, self.folder.parent):
            files.clear_unfinished(folder)
        for other in self.paths():
            if path is None or other > path:
                other.rename(self.folder / f"damaged-{other.name}-{time.time_ns()}")


def _write(content: bytes, path: Path) -> None:
    files.write_bytes(path, content)


def _torch_save(value: Any, path: Path) -> None:
    torch.save(value, path)


def _nested_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() + 300
    if isinstance(value, dict | list | tuple):
        return 100 + sum(_nested_bytes(v) for v in (value.values() if isinstance(value, dict) else value))
    return 20


def restore(path: Path, objective: nn.Module) -> dict[str, Any]:
    """Load a checkpoint's tensors into the objective, strictly; return the state dicts of optimizer and scaler."""
    file = path / "objective.safetensors"
    try:
        objective.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this objective: {error}") from error
    return read_pickled_tensors(path / "optimizer.pt")
