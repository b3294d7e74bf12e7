"""Run, print and save benchmarks: medians, their ratios, and the machine."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(cases: dict[str, Callable[[], None]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time every case once per round, in turn, so that a drifting machine affects all; returns seconds by case."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def write(name: str, figures: dict[str, float], out: Path = Path("runs/bench")) -> None:
    """Print the figures and save them with the machine's description as `<out>/<name>.json`."""
    for key, value in figures.items():
        print(f"  {key:<44} {value:>10.3f}")
    figures = {key: round(value, 4) for key, value in figures.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({**figures, "machine": machine()}, indent=1) + "\n")
    print(f"  written to {out / name}.json")


def machine() -> dict[str, str | int | None]:
    """Describe what the figures were measured on."""
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    return {**facts, "processor": _processor()}


def medians(seconds: dict[str, list[float]], prefix: str = "seconds_") -> dict[str, float]:
    return {prefix + name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of slow / fast; the two runs of a round are close in time."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
