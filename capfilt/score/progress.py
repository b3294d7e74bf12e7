"""Progress of a scoring process: one line on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from capfilt.schema import FAULTS, USABLE

_WINDOW = 120.0
"""Seconds over which the rate is measured."""


class Reported:
    """Figures that are shown now and then."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self._shown_at = 0.0
        self._width = 0

    def report(self) -> dict[str, Any]:
        """Return all figures by name."""
        raise NotImplementedError

    def say(self, *, always: bool = False) -> None:
        """Print the line on a terminal every half second, elsewhere a JSON line every ten."""
        now = time.monotonic()
        terminal = self.out.isatty()
        if not always and now - self._shown_at < (0.5 if terminal else 10.0):
            return
        self._shown_at = now
        if terminal:
            line = line_of(self.report())
            self.out.write("\r" + line.ljust(self._width) + ("\n" if always else ""))
            self._width = len(line)
        else:
            self.out.write(json.dumps(self.report()) + "\n")
        self.out.flush()


class ScoringProgress(Reported):
    """Counts of rows, and seconds by stage. Rows that an earlier process scored do not count for the rate."""

    def __init__(self, rows: int, inherited: int, parts: int, parts_done: int, out: TextIO | None = None) -> None:
        super().__init__(out)
        self.total, self.done, self.inherited = rows, inherited, inherited
        self.parts, self.parts_done, self.retried, self.failed = parts, parts_done, 0, 0
        self.statuses: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.left_out = 0
        self.stages: dict[str, float] = {}
        self._begun = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._begun, inherited)])

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
        left = self.seconds_left()
        spent = sum(self.stages.values()) or 1.0
        return {
            "rows": self.done,
            "of": self.total,
            "inherited": self.inherited,
            "rows_per_second": round(self.rate(), 2),
            "seconds_left": None if left is None else round(left[0]),
            "give_or_take": None if left is None else round(left[1]),
            **_kept_at_half({kind: (self.kept[f"{kind} kept"], self.kept[kind]) for kind in ("web", "syn")}),
            "statuses": dict(self.statuses),
            "texts_left_out": self.left_out,
            "busy": {name: round(seconds / spent, 3) for name, seconds in self.stages.items()},
            "parts": self.parts_done,
            "parts_of": self.parts,
            "retried": self.retried,
            "failed": self.failed,
        }


class CombinedProgress(Reported):
    """The last reports of several processes that share a run, as one."""

    def __init__(self, rows: int, parts: int, out: TextIO | None = None) -> None:
        """Begin with the number of rows and parts of all processes together."""
        super().__init__(out)
        self.total, self.parts = rows, parts
        self.reports: dict[int, dict[str, Any]] = {}
        """Last report of each process by its rank."""

    def finish(self, rank: int) -> None:
        """Note that a process has ended: it has no rate any more."""
        if rank in self.reports:
            self.reports[rank] |= {"rows_per_second": 0.0, "seconds_left": None, "give_or_take": None}

    def report(self) -> dict[str, Any]:
        each = list(self.reports.values())
        sums = {name: sum(one[name] for one in each) for name in _SUMMED}
        slowest = max(each, key=lambda one: one["seconds_left"] or 0, default={})
        scored = {kind: [sum(one[f"{kind}_scored"][i] for one in each) for i in (0, 1)] for kind in ("web", "syn")}
        busy = Counter[str]()
        for one in each:
            busy.update({name: share / len(each) for name, share in one["busy"].items()})
        return {
            **sums,
            "rows_per_second": round(sums["rows_per_second"], 2),
            "of": self.total,
            "parts_of": self.parts,
            **{name: slowest.get(name) for name in ("seconds_left", "give_or_take")},
            **_kept_at_half(scored),
            "statuses": dict(sum((Counter(one["statuses"]) for one in each), Counter())),
            "busy": {name: round(share, 3) for name, share in busy.items()},
            "processes": len(each),
        }


_SUMMED = ("rows", "inherited", "rows_per_second", "texts_left_out", "parts", "retried", "failed")


def _kept_at_half(scored: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return how many texts are kept at 0.5, how many have a score, and the share, by kind of text."""
    shares = {f"{kind}_kept_at_half": round(kept / n, 4) if n else None for kind, (kept, n) in scored.items()}
    return shares | {f"{kind}_scored": list(counts) for kind, counts in scored.items()}


def line_of(report: Mapping[str, Any]) -> str:
    """Format a report as a line."""
    rows, of, statuses = report["rows"], report["of"], report["statuses"]
    seen = sum(statuses.values())
    bits = [f"rows {_short(rows)}/{_short(of)} {rows / max(1, of):.1%}"]
    bits.append(f"{report['rows_per_second']:,.0f} img/s" if report["rows_per_second"] >= 10 else
                f"{report['rows_per_second']:.2f} img/s")  # fmt: skip
    if report["seconds_left"] is not None:
        bits.append(f"ETA {clock(report['seconds_left'])} ±{clock(report['give_or_take'])}")
    shares = [
        f"{k} {report[f'{k}_kept_at_half']:.1%}" for k in ("web", "syn") if report[f"{k}_kept_at_half"] is not None
    ]
    if shares:
        bits.append("keep@0.5 " + " ".join(shares))
    unusable = {k: n for k, n in statuses.items() if k not in USABLE}
    if seen:
        listed = " ".join(f"{k} {n / seen:.2%}" for k, n in sorted(unusable.items(), key=lambda x: -x[1])[:3])
        errors = sum(n for status, n in statuses.items() if status in FAULTS)
        bits.append(f"errors {errors / seen:.2%}" + (f" ({listed})" if listed else ""))
    if report["texts_left_out"]:
        bits.append(f"{_short(report['texts_left_out'])} texts left out")
    busy = report["busy"]
    if busy:
        starved = max((k for k in busy if k != "models"), key=busy.get, default=None)
        bits.append(
            f"models busy {busy.get('models', 0):.0%}" + (f", wait {starved} {busy[starved]:.0%}" if starved else "")
        )
    bits.append(f"parts {report['parts']}/{report['parts_of']} retried {report['retried']} failed {report['failed']}")
    return " | ".join(bits)


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
