"""What a run needs to continue as if it had never stopped: its lock, its settings, its checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from blip import files
from blip.errors import Stopped
from blip.processes import started
from blip.startup import program
from blip.tensors import read_pickled_tensors, read_tensors, tensor_bytes, write_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = frozenset(
    {"log_every", "save_every", "keep_checkpoints", "eval_every", "trackers", "skip_nonfinite", "allow_change"}
    | {"workers", "worker_timeout", "max_bad_fraction", "timeout", "out"}
)
"""Settings that do not touch what is computed; all others must stay the same when a run continues."""
YOUNGER = {"length_rule": "generated"}
"""Settings that checkpoints of before do not name -> what was done then."""

_BEATS, _STALE = 10.0, 60.0
"""Seconds between signs of life in the lock, and without one after which another machine's lock is void."""


class RunLocked(Stopped):
    """Another process writes to this run directory."""


class RunLock:
    """One writer per run directory.

    A POSIX record lock decides on a local disk and, where its lock service runs, on NFS: the kernel gives it back when
    the holder dies, and no child inherits it. For file systems without one, the file says who holds it and is touched
    every few seconds. On Windows filelock's lock, on a file of its own, takes the place of the record lock.
    """

    _held_here: set[Path] = set()  # noqa: RUF012 - a record lock does not stop its own process

    def __init__(self, out: Path) -> None:
        self.path = out / "run.lock"
        self._stop = threading.Event()
        self._held: Any = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._key = self.path.resolve()
        if self._key in self._held_here:
            raise RunLocked(f"{self.path.parent} is already written to by this process ({os.getpid()})")
        self._file = self.path.open("a+")
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        self._held_here.add(self._key)
        self._write({"pid": os.getpid(), "host": socket.gethostname(), "started": started(os.getpid())})
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._write(None)
        self._held_here.discard(self._key)
        self._file.close()
        if self._held is not None:
            self._held.release()

    def check(self) -> None:
        """RunLocked if the folder was removed or replaced meanwhile: it may be another process's by now."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # a file system that is away for a moment is no other folder
            return
        raise RunLocked(
            f"{self.path.parent} was removed or replaced while this run was writing to it, and another run may write "
            "there now; nothing more is written. Start again, or in another directory"
        )

    def _take(self) -> None:
        try:
            certain = self._take_of_the_system()
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RunLocked(self._refusal(self._read() or {})) from None
            certain = False
        holder = self._read()
        if holder is None:
            return
        age = time.time() - self.path.stat().st_mtime
        here = holder.get("host") == socket.gethostname()
        alive = (not certain and started(holder.get("pid", 0)) == holder.get("started")) if here else age < _STALE
        if alive:
            raise RunLocked(self._refusal(holder))
        logger.warning("taking over the lock of process %s on %s, which is gone", holder.get("pid"), holder.get("host"))

    def _take_of_the_system(self) -> bool:
        """Whether the lock is this process's for as long as it lives; OSError if another has it or there is none."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        import filelock

        self._held = filelock.FileLock(f"{self.path}.held", timeout=0)
        try:
            self._held.acquire()
        except filelock.Timeout:
            raise OSError(errno.EAGAIN, "another process has the lock") from None
        return True

    def _refusal(self, holder: dict) -> str:
        return (
            f"{self.path.parent} is written to by process {holder.get('pid', 'unknown')} "
            f"on {holder.get('host', 'unknown')}: stop it first, or give this run another directory"
        )

    def _read(self) -> dict | None:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
        except ValueError:
            return None
        return holder if isinstance(holder, dict) else None

    def _write(self, holder: dict | None) -> None:
        self._file.seek(0)
        self._file.truncate()
        if holder:
            self._file.write(json.dumps(holder))
        self._file.flush()

    def _beat(self) -> None:
        while not self._stop.wait(_BEATS):
            try:
                self.check()
                os.utime(self.path)
            except (OSError, RunLocked):
                logger.warning("cannot touch %s", self.path)


@dataclass
class State:
    """Where a run is."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Pairs seen."""
    skipped: int = 0
    """Updates left out because a loss or gradient was not finite."""
    seconds: float = 0.0
    """Time spent in steps."""
    window: dict[str, list[float]] = field(default_factory=dict)
    """Sums and counts of what the next log line will average."""


def plain(value: Any) -> Any:
    """Settings as JSON holds them: paths as text, tuples as lists."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def flatten(settings: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def drift(before: dict, now: dict) -> list[str]:
    """Lines `name: before -> now` for settings that differ and are not free to."""
    old, new = flatten(plain(before)), flatten(plain(now))
    for name in new.keys() - old.keys():
        last = name.rpartition(".")[2]
        if last in YOUNGER:
            old[name] = YOUNGER[last]
    gone = "(not set)"
    return [
        f"{name}: {old.get(name, gone)} -> {new.get(name, gone)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, gone) != new.get(name, gone) and not FREE_TO_CHANGE & set(name.split("."))
    ]


def refuse_drift(said: dict, settings: dict, fingerprint: str, layout: dict[str, int], where: Path) -> None:
    """ValueError that lists what differs between a checkpoint and the run that would continue it."""
    lines = drift(said["settings"], settings)
    if said["fingerprint"] != fingerprint:
        lines.append(f"data: fingerprint {said['fingerprint']} -> {fingerprint} (files or rows are not the same)")
    before = said["layout"]
    changed = [f"{name} {before[name]} -> {layout[name]}" for name in layout if before[name] != layout[name]]
    if changed:
        lines.append(
            f"processes: {', '.join(changed)}; which pairs meet in a batch, and so the losses, would change. "
            f"Continue with {before['world']} processes of {before['batch_size']} pairs x {before['accumulate']}"
        )
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(
            f"{where} was made with other settings:\n  {listed}\n"
            "Go back to those, choose a new output directory, or set train.allow_change to continue all the same."
        )


class Checkpoints:
    """`out/checkpoints/step-00001000/`: each whole or absent, the newest few kept."""

    def __init__(self, out: Path, keep: int) -> None:
        self.folder, self.keep = out / "checkpoints", keep

    def paths(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def save(self, objective: nn.Module, extra: dict[str, Any], state: State, facts: dict[str, Any]) -> Path:
        """Publish the state of a run, then remove what is too old. `extra`: state dicts of optimizer and scaler.

        atomic.WriteError if the disk is full: nothing is left behind and older checkpoints are untouched.
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
        """The newest checkpoint whose files are all as they were written, and what its state.json says."""
        for path in reversed(self.paths()):
            try:
                files.check_manifest(path)
                return path, json.loads((path / "state.json").read_bytes())
            except PermissionError:  # whole for who may read it: to pass it over would throw work away
                raise
            except (OSError, ValueError) as error:
                logger.warning("checkpoint %s is damaged and was passed over: %s", path.name, error)
        return None

    def discard_after(self, path: Path | None) -> None:
        """Move damaged checkpoints newer than the one in use out of the way, and remove what was never finished."""
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
    """Load a checkpoint's tensors into the objective, strictly; returns the state dicts of optimizer and scaler."""
    file = path / "objective.safetensors"
    try:
        objective.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this objective: {error}") from error
    return read_pickled_tensors(path / "optimizer.pt")


_VERSIONED = ("openblip", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in (
        "openblip",
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "accelerate",
        "datasets",
        "pillow",
        "numpy",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, with a + if it has changes; None outside a checkout."""
    here, git = Path(__file__).resolve().parent, program("git")
    if git is None:
        return None

    def ask(*words: str) -> str:
        command = [git, "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not ask("ls-files", Path(__file__).name):
            return None
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_run(out: Path, settings: dict, layout: dict[str, int], device: str) -> None:
    """Write config.yaml (the effective settings) and add this start to run.json (versions, commit, command, host)."""
    files.replace_file(out / "config.yaml", yaml.safe_dump(plain(settings), sort_keys=False).encode())
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "commit": git_commit(),
        "versions": versions(),
        "device": device,
        **layout,
    }
    path = out / "run.json"
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        starts = []
    files.replace_file(path, json.dumps({"starts": [*starts, start]}, indent=1).encode())
