"""Scoring on the GPUs of this machine: one process for each, with a fixed share of the parts, and one progress line.

The processes know nothing of each other, so that one that dies stops no other: its parts are left for the next start.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from blip import startup
from blip.app.exit import SOME_FAILED
from blip.processes import cores, place
from capfilt.run import Run
from capfilt.score.loop import on_stop
from capfilt.score.progress import CombinedProgress
from capfilt.settings import DONE, FAILED_PARTS, INTERRUPTED, WRONG

_WORST_FIRST = (INTERRUPTED, FAILED_PARTS, SOME_FAILED, WRONG, DONE)
"""Exit statuses of which the first that a process ends with is that of all."""
_REPORT = '{"rows": '
"""Beginning of a line with a process's figures."""


@dataclass
class _Started:
    """A scoring process."""

    rank: int
    process: subprocess.Popen


def count_of(gpus: str, device: str) -> int:
    """Return the number of processes for `gpus`, a number or `all`. ValueError if this machine has not so many GPUs."""
    if gpus != "all" and not (gpus.isdecimal() and int(gpus) > 0):
        raise ValueError(f"gpus is a number of GPUs, 1 or more, or all, got {gpus!r}")
    if device == "cpu":
        if gpus == "all":
            raise ValueError("--device cpu leaves no GPU to count: give the number of processes, --gpus N")
        return int(gpus)
    if device not in ("auto", "cuda"):
        raise ValueError(f"--device {device} is one device, and each process has its own: leave it out, or give cpu")
    import torch

    there = torch.cuda.device_count()
    if not there:
        raise ValueError("no GPU is visible here; score with one process, `capfilt score`, or give --device cpu")
    if gpus == "all":
        return there
    if int(gpus) > there:
        raise ValueError(f"--gpus {gpus}: only {there} are visible here; give --gpus {there}, or all")
    return int(gpus)


def launch(run: Run, arguments: Sequence[str], count: int, out: TextIO | None = None) -> int:
    """Score with `count` processes that run `capfilt score ARGUMENTS`; returns the exit status of all together.

    As one of several launchers, one per machine and each with as many processes, it shares the parts with the others.
    """
    out = out or sys.stderr
    rank, world = place()
    ranks, total = range(rank * count, (rank + 1) * count), world * count
    mine = [part for one in ranks for part in run.share(one, total)]
    progress = CombinedProgress(sum(part.rows for part in mine), len(mine), out)
    lines: queue.SimpleQueue[tuple[_Started, str | None]] = queue.SimpleQueue()
    started: list[_Started] = []
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        for one in started:
            one.process.send_signal(signal.SIGTERM)

    try:
        with on_stop(stop):
            for local, number in enumerate(ranks):
                started.append(_Started(number, _start(arguments, local, count, number, total)))
                threading.Thread(target=_read, args=(started[-1], lines), daemon=True).start()
                if stopped.is_set():  # the signal came while it was being started
                    stop()
            _follow(len(started), lines, progress)
    finally:
        for one in started:
            one.process.kill()  # unless this process fails, all have ended
            one.process.wait()
    progress.say(always=True)
    return _status(started, stopped.is_set(), out)


def _start(arguments: Sequence[str], local: int, count: int, rank: int, world: int) -> subprocess.Popen:
    ranks = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
    threads = {"OMP_NUM_THREADS": max(1, cores() // count)}
    environment = {name: str(value) for name, value in (threads | os.environ | ranks).items()}
    return subprocess.Popen(
        startup.python("capfilt", "score", *arguments),
        env=startup.environment() | environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
    )


def _read(one: _Started, lines: queue.SimpleQueue[tuple[_Started, str | None]]) -> None:
    """Put a process's lines into the queue, and None when it has ended."""
    assert one.process.stderr is not None
    for line in one.process.stderr:
        lines.put((one, line.rstrip()))
    one.process.wait()
    lines.put((one, None))


def _follow(left: int, lines: queue.SimpleQueue[tuple[_Started, str | None]], progress: CombinedProgress) -> None:
    """Show what the processes report until all have ended: their figures as one line, the rest once."""
    shown: set[str] = set()
    while left:
        one, line = lines.get()
        if line is None:
            progress.finish(one.rank)
            left -= 1
        elif line.startswith(_REPORT):
            progress.reports[one.rank] = json.loads(line)
            progress.say()
        elif line not in shown:
            shown.add(line)
            progress.out.write(line if line.startswith("process ") else f"process {one.rank}: {line}")
            progress.out.write("\n")
            progress.out.flush()


def _status(started: Sequence[_Started], is_stopped: bool, out: TextIO) -> int:
    """Return the exit status of all processes together; prints which of them died."""
    statuses = set()
    for one in started:
        status = one.process.returncode
        if status < 0 and not is_stopped:
            out.write(
                f"process {one.rank} was ended by {signal.Signals(-status).name}; the same command scores the parts "
                "that it has left\n"
            )
        statuses.add((INTERRUPTED if is_stopped else FAILED_PARTS) if status < 0 else status)
    return next((status for status in _WORST_FIRST if status in statuses), SOME_FAILED)
