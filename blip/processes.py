"""Processes and cores of this machine, on Linux, macOS and Windows alike, and this one's place among a launcher's.

Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil


def started(pid: int) -> str | None:
    """Identity of a process that a later one with its number does not have; None if no such process is alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] not in "ZX" else None  # in clock ticks since boot, which no clock change moves
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        process = psutil.Process(pid)
        return str(process.create_time()) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, ValueError):
        return None


def command_of(pid: int) -> list[str]:
    """Words of a process's command line; empty if it is gone or another user's."""
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.Error, ValueError):
        return []


_PLACES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
"""Variables with a process's rank and the number of processes, of torchrun and accelerate, SLURM, and the MPIs."""


def place() -> tuple[int, int]:
    """Rank of this process among those that a launcher started, and their number: (0, 1) without a launcher.

    A SLURM batch script itself is one process, whatever the number of tasks of its job; `srun` starts the tasks.
    ValueError if a launcher gave the number of processes without the ranks.
    """
    in_step = "SLURM_JOB_ID" not in os.environ or "SLURM_STEP_ID" in os.environ
    for rank, world in _PLACES:
        if rank in os.environ and world in os.environ and (in_step or not rank.startswith("SLURM")):
            return int(os.environ[rank]), int(os.environ[world])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("WORLD_SIZE is more than 1 and RANK is not set: set both for each process, or neither")
    return 0, 1


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process started with `start_new_session`, with its children; only itself on systems without groups."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
