"""Progress of a scoring process: one line on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from typing import Any, TextIO

from capfilt.schema import FAULTS, USABLE

_WINDOW = 120.0
"""Seconds over which the rate is measured."""


class ScoringProgress:
    """Counts of rows, and seconds by stage. Rows that an earlier process scored do not count for the rate."""

    def __init__(self, rows: int, inherited: int, parts: int, parts_done: int, out: TextIO | None = None) -> None:
        self.total, self.done, self.inherited = rows, inherited, inherited
        self.parts, self.parts_done, self.retried, self.failed = parts, parts_done, 0, 0
        self.out = out or sys.stderr
        self.statuses: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.left_out = 0
        self.stages: dict[str, float] = {}
        self._begun = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._begun, inherited)])
        self._shown_at = 0.0
        self._width = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count a part's annotations."""
        self.done += len(rows)
        self.parts_done += 1
        for row in rows:
            self.statuses[row["status"]] += 1
            self.left_out += row.get("left_out", 0)
            for kind in ("web", "syn"):
                scores = [p for p in row[f"itm_{kind}"] if p is not None]
                self.kept[kind] += len(scores)
                self.kept[f"{kind} kept"] += sum(p >= 0.5 for p in scores)
        self._marks.append((time.monotonic(), self.done))
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[0][0] > _WINDOW:
            self._marks.popleft()

    def inherit(self, rows: int) -> None:
        """Count a part that another process has scored."""
        self.parts_done += 1
        self.done += rows
        self.inherited += rows
        for i, (moment, done) in enumerate(self._marks):
            self._marks[i] = (moment, done + rows)

    @property
    def errors(self) -> int:
        return sum(n for status, n in self.statuses.items() if status in FAULTS)

    @property
    def seen(self) -> int:
        return sum(self.statuses.values())

    def rate(self) -> float:
        """Return recent rows per second."""
        (start, before), (end, now) = self._marks[0], self._marks[-1]
        return (now - before) / (end - start) if end > start else 0.0

    def seconds_left(self) -> tuple[float, float] | None:
        """Return the remaining seconds and their uncertainty; None before there is an estimate."""
        rate = self.rate()
        if not rate or self.done == self.inherited:
            return None
        left = (self.total - self.done) / rate
        overall = (self.done - self.inherited) / (self._marks[-1][0] - self._begun)
        return left, abs(left - (self.total - self.done) / overall) + 0.05 * left

    def report(self) -> dict[str, Any]:
        """Return all figures by name."""
        left = self.seconds_left()
        spent = sum(self.stages.values()) or 1.0
        return {
            "rows": self.done,
            "of": self.total,
            "inherited": self.inherited,
            "rows_per_second": round(self.rate(), 2),
            "seconds_left": None if left is None else round(left[0]),
            "give_or_take": None if left is None else round(left[1]),
            "web_kept_at_half": self._share("web"),
            "syn_kept_at_half": self._share("syn"),
            "statuses": dict(self.statuses),
            "texts_left_out": self.left_out,
            "busy": {name: round(seconds / spent, 3) for name, seconds in self.stages.items()},
            "parts": self.parts_done,
            "parts_of": self.parts,
            "retried": self.retried,
            "failed": self.failed,
        }

    def _share(self, kind: str) -> float | None:
        return round(self.kept[f"{kind} kept"] / self.kept[kind], 4) if self.kept[kind] else None

    def line(self) -> str:
        """Format the report as a line."""
        report = self.report()
        done = f"rows {_short(self.done)}/{_short(self.total)} {self.done / max(1, self.total):.1%}"
        bits = [done, f"{report['rows_per_second']:,.0f} img/s" if report["rows_per_second"] >= 10 else
                f"{report['rows_per_second']:.2f} img/s"]  # fmt: skip
        if report["seconds_left"] is not None:
            bits.append(f"ETA {clock(report['seconds_left'])} ±{clock(report['give_or_take'])}")
        shares = [
            f"{k} {report[f'{k}_kept_at_half']:.1%}" for k in ("web", "syn") if report[f"{k}_kept_at_half"] is not None
        ]
        if shares:
            bits.append("keep@0.5 " + " ".join(shares))
        unusable = {k: n for k, n in self.statuses.items() if k not in USABLE}
        if self.seen:
            listed = " ".join(f"{k} {n / self.seen:.2%}" for k, n in sorted(unusable.items(), key=lambda x: -x[1])[:3])
            bits.append(f"errors {self.errors / self.seen:.2%}" + (f" ({listed})" if listed else ""))
        if self.left_out:
            bits.append(f"{_short(self.left_out)} texts left out")
        busy = report["busy"]
        if busy:
            starved = max((k for k in busy if k != "models"), key=busy.get, default=None)
            bits.append(
                f"models busy {busy.get('models', 0):.0%}"
                + (f", wait {starved} {busy[starved]:.0%}" if starved else "")
            )
        bits.append(f"parts {self.parts_done}/{self.parts} retried {self.retried} failed {self.failed}")
        return " | ".join(bits)

    def say(self, *, always: bool = False) -> None:
        """Print the line on a terminal every half second, elsewhere a JSON line every ten."""
        now = time.monotonic()
        terminal = self.out.isatty()
        if not always and now - self._shown_at < (0.5 if terminal else 10.0):
            return
        self._shown_at = now
        if terminal:
            line = self.line()
            self.out.write("\r" + line.ljust(self._width) + ("\n" if always else ""))
            self._width = len(line)
        else:
            self.out.write(json.dumps(self.report()) + "\n")
        self.out.flush()


def _short(n: int) -> str:
    if n < 10_000:
        return str(n)
    return f"{n / 1e3:.1f}k" if n < 1_000_000 else f"{n / 1e6:.2f}M"


def clock(seconds: float) -> str:
    """Format seconds as 12s, 3m05 or 2h04."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02}" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}"
