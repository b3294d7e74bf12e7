"""Dry run: score a few rows, estimate time and size of the whole run, and write nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from capfilt.run import Part, Run
from capfilt.score import annotate
from capfilt.score.loop import ScoreOptions, Worker
from capfilt.score.progress import clock
from capfilt.score.scorer import Scorer
from capfilt.settings import DONE
from capfilt.store import parts

_ROWS = 64


class Silent:
    """Claims that leave no trace."""

    def begin(self, part: Part, attempt: int) -> None: ...
    def fail(self, part: Part, code: str, detail: str, error: BaseException | None = None) -> None: ...


def dry_run(run: Run, make_scorer: Callable[[Run], Scorer], options: ScoreOptions) -> int:
    """Score the first rows of some parts and print rows, parts, images per second, hours and bytes."""
    worker = Worker(run, make_scorer(run), options)
    worker.claims = Silent()
    todo = run.in_order()
    pieces = [Part(p.pid, p.source, p.lo, min(p.hi, p.lo + 16)) for p in todo[: _ROWS // 16]]
    worker.annotate(pieces[0], worker.begin(pieces[0], 1), 1)  # the first is slow for reasons that pass
    start, rows, size = time.monotonic(), 0, 0
    for piece in pieces:
        annotations = worker.annotate(piece, worker.begin(piece, 1), 1)
        rows += len(annotations)
        size += len(parts.encode(annotate.table_of(annotations, piece), {}))
    rate = rows / (time.monotonic() - start)
    worker.close()
    done = run.parts.present().keys()
    left = sum(part.rows for part in run.plan if part.pid not in done)
    print(f"{run.rows:,} rows in {len(run.plan):,} parts, {left:,} rows to do")
    print(f"{rate:,.2f} images/s on {worker.scorer.device}, one process: about {clock(left / rate)}")
    print(f"about {size / rows * left / 1e6:,.1f} MB of annotations; nothing was written")
    return DONE
