"""Processes and cores of this machine, on Linux, macOS and Windows alike. Imports nothing heavy."""

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
