"""Progress of a run, read from its files alone: works from another shell or machine while others score."""

from __future__ import annotations

import time
from typing import Any

from capfilt.extra import results
from capfilt.extra.results import ExtraParts, scorers_of
from capfilt.run import Run
from capfilt.score.progress import clock
from capfilt.store.parts import FAILURES, failure_name, failures, read_failure

_WINDOW = 600.0


def status(run: Run) -> dict[str, Any]:
    """Count rows and parts, with the rate of the last ten minutes of work and the failures."""
    present = run.parts.present()
    done = [part for part in run.plan if part.pid in present]
    stamps = sorted((present[part.pid][1], part.rows) for part in done)
    recent = [one for one in stamps if stamps and one[0] > stamps[-1][0] - _WINDOW]
    span = recent[-1][0] - recent[0][0] if recent else 0.0
    rate = sum(rows for _, rows in recent[1:]) / span if span > 0 else 0.0
    rows = sum(part.rows for part in done)
    trouble, begun = [], 0
    extra = {name: ExtraParts(run.storage, name).present().keys() & present.keys() for name in scorers_of(run)}
    for pid, numbers in failures(run.storage).items():
        note = read_failure(run.storage, pid, max(numbers))
        if note.get("state") == "begun":
            begun += 1
        elif pid not in present:
            trouble.append(
                {"part": pid, "attempts": len(numbers), "source": note.get("source"), "why": note.get("detail")}
            )
    return {
        "rows": rows,
        "of": run.rows,
        "parts": len(done),
        "parts_of": len(run.plan),
        "rows_per_second": round(rate, 2),
        "seconds_left": round((run.rows - rows) / rate) if rate and rows < run.rows else None,
        "last_part_seconds_ago": round(time.time() - stamps[-1][0]) if stamps else None,
        "parts_begun": begun,
        "failures": trouble,
        "extra": {name: {"parts": len(pids)} for name, pids in extra.items()},
        "damaged_sources": [{"path": s.path, "damage": s.damage} for s in run.damaged()],
        "fingerprint": run.fingerprint,
    }


def lines(state: dict[str, Any]) -> list[str]:
    """Format the status as lines of text."""
    left = f", ETA {clock(state['seconds_left'])}" if state["seconds_left"] is not None else ""
    ago = state["last_part_seconds_ago"]
    rows, of = state["rows"], state["of"]
    out = [f"rows {rows:,}/{of:,} ({rows / max(1, of):.1%}), parts {state['parts']:,}/{state['parts_of']:,}, "
           f"{state['rows_per_second']:,} rows/s{left}"]  # fmt: skip
    if ago is not None:
        out.append(f"last part {clock(ago)} ago, {state['parts_begun']} begun and not committed")
    out += [f"{name}: parts {facts['parts']:,}/{state['parts']:,}" for name, facts in state["extra"].items()]
    out += [f"failed {f['attempts']} times: {f['part']} ({f['source']}): {f['why']}" for f in state["failures"][:5]]
    out += [f"source_damaged: {s['path']}: {s['damage']}" for s in state["damaged_sources"][:5]]
    return out


def retry_failed(run: Run) -> int:
    """Forget the failed attempts of parts that are not done, and parts for whose rows a further scorer raised errors.

    Returns the number of such parts.
    """
    present = run.parts.present()
    count = 0
    for folder in (FAILURES, results.FAILURES):
        for pid, numbers in failures(run.storage, folder).items():
            note = read_failure(run.storage, pid, max(numbers), folder)
            count += pid not in present or (folder != FAILURES and note.get("state") == "failed")
            for number in numbers:
                run.storage.remove(failure_name(pid, number, folder))
    for name in scorers_of(run):
        count += results.forget_raised(run, name)
    return count
