"""The passes of further scorers: along with captioner and filter, or afterwards over what these have scored.

Both show a scorer the same rows, those with a usable image, and the same pixels; a part's file is written whole, and
the same command goes on with the parts that have none.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from capfilt import __version__
from capfilt.extra.load import EMBEDDING, load_scorers
from capfilt.extra.results import (
    FAILURES,
    ExtraParts,
    embedding_record,
    encode_embeddings,
    encode_table,
    record_of,
)
from capfilt.extra.scorer import ExtraScorer, RowTexts, WrongScorer, check_scores
from capfilt.run import Part, Run
from capfilt.schema import USABLE
from capfilt.score.claims import Claims
from capfilt.score.decoding import Decoded
from capfilt.score.loop import (
    ScoringInterrupted,
    Tasks,
    Worker,
    progress_of,
    score,
    score_parts,
    share_of,
    sort_work,
)
from capfilt.score.scorer import BatchTooLarge, Item, Scorer, Scores
from capfilt.settings import DONE, FAILED_PARTS, INTERRUPTED, WRONG, ScoreOptions

_JUDGED = 200
"""Rows after which a scorer that mostly raises errors is given up."""
_RAISED = "score_invalid"
"""Status, for the progress line and the limit on errors, of a row for which a scorer raised."""


class ShownRow(NamedTuple):
    """A row as scorers see it."""

    number: int
    images: dict[int, np.ndarray]
    """Images (S, S, 3) by their side; a side may be missing."""
    texts: RowTexts
    embedding: np.ndarray | None


class _Scored:
    """One scorer in a pass, and its files."""

    def __init__(self, run: Run, scorer: ExtraScorer, most: float) -> None:
        """Record who scores. `most` is the largest share of rows for which the scorer may raise an error."""
        self.scorer, self.side, self._most = scorer, scorer.side, most
        self.shown, self.raised = 0, Counter()
        self.parts = ExtraParts(run.storage, scorer.name)
        self.mark = self.parts.claim(record_of(scorer))
        self._facts = {"fingerprint": self.mark, "scorer": scorer.name, "run": run.fingerprint, "code": __version__}

    def score(self, rows: Sequence[ShownRow]) -> list[dict[str, Any]]:
        """Return the scores of rows, or the `error` of those for which the scorer raises; WrongScorer if most do."""
        scores = self._score(rows)
        self.shown += len(rows)
        self.raised.update(one["error"] for one in scores if "error" in one)
        if self.shown >= _JUDGED and self.raised.total() > self._most * self.shown:
            raise WrongScorer(f"scorer {self.scorer.name} {self.account()}; mend it, or give --max-error-rate 1")
        return scores

    def account(self) -> str:
        """Describe how many rows raised an error."""
        line = f"raised an error for {self.raised.total():,} of {self.shown:,} rows"
        return line + (f" ({self.raised.most_common(1)[0][0]})" if self.raised else "")

    def _score(self, rows: Sequence[ShownRow]) -> list[dict[str, Any]]:
        blind = [row for row in rows if self.side and self.side not in row.images]
        if blind and len(rows) == 1:
            return [{"error": "the image could not be decoded"}]
        try:
            if not blind:
                images = [row.images[self.side] for row in rows] if self.side else []
                texts = [row.texts for row in rows]
                return check_scores(self.scorer, self.scorer.score(images, texts), texts)
        except WrongScorer:
            raise
        except Exception as error:
            if len(rows) == 1:
                return [
                    {"error": f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()[:300]}
                ]
        half = len(rows) // 2  # outside of the handler nothing of the failed batch is referred to any more
        return [*self._score(rows[:half]), *self._score(rows[half:])]

    def encode(self, ids: list[str], rows: list[dict[str, Any]]) -> bytes:
        return encode_table(ids, rows, self.scorer.columns, self._facts)


class _Embedded:
    """The filter's embeddings in a pass, and their files."""

    side = 0

    def __init__(self, run: Run, size: int) -> None:
        self.parts, self.size = ExtraParts(run.storage, EMBEDDING), size
        self.mark = self.parts.claim(embedding_record(run, size))

    def score(self, rows: Sequence[ShownRow]) -> list[dict[str, Any]]:
        return [{EMBEDDING: row.embedding} for row in rows]

    def encode(self, ids: list[str], rows: list[dict[str, Any]]) -> bytes:
        return encode_embeddings([row.get(EMBEDDING) for row in rows], self.size)


class _Extras:
    """All further scorers of a pass, and what they gave for parts that are not written yet."""

    def __init__(self, run: Run, scorers: Sequence[ExtraScorer], embedder: Scorer | None, most: float) -> None:
        self.each: list[_Scored | _Embedded] = [_Scored(run, scorer, most) for scorer in scorers]
        self.each += [_Embedded(run, embedder.embedding_size)] if embedder else []
        self.sides = tuple(dict.fromkeys(one.side for one in self.each if one.side))
        self._scores: dict[str, dict[int, list[dict[str, Any]]]] = {}

    def begin(self, part: Part) -> None:
        """Forget what an earlier attempt gave."""
        self._scores[part.pid] = {}

    def score(self, part: Part, rows: Sequence[ShownRow], each: Sequence[_Scored | _Embedded] | None = None) -> None:
        if rows:
            given = [one.score(rows) for one in (self.each if each is None else each)]
            for row, *scores in zip(rows, *given, strict=True):
                self._scores[part.pid][row.number] = scores

    def commit(self, part: Part, ids: list[str], each: Sequence[_Scored | _Embedded] | None = None) -> None:
        scores = self._scores.pop(part.pid)
        each = self.each if each is None else each
        nothing: list[dict[str, Any]] = [{}] * len(each)
        rows = [scores.get(number, nothing) for number in range(part.lo, part.hi)]
        for one, given in zip(each, zip(*rows, strict=True), strict=True):
            one.parts.check_claim(one.mark)
            one.parts.storage.write(one.parts.name(part.pid), one.encode(ids, list(given)))

    def raised(self, part: Part, number: int) -> bool:
        return any("error" in one for one in self._scores[part.pid].get(number, ()))

    def exit_status(self, out: TextIO, status: int) -> int:
        """Print how many rows raised an error; returns WRONG for a scorer that raised one for all, else `status`."""
        for one in self.each:
            if isinstance(one, _Scored) and one.raised:
                out.write(f"{one.scorer.name} {one.account()}; `capfilt retry-failed` forgets these parts\n")
                if one.raised.total() == one.shown and status == DONE:
                    status = WRONG
        return status


class SharingWorker(Worker):
    """Scores parts and shows each decoded image to further scorers as well."""

    def __init__(
        self, run: Run, scorer: Scorer, options: ScoreOptions, scorers: Sequence[ExtraScorer], embeds: bool
    ) -> None:
        """Make a worker for parts that captioner and filter have not scored yet."""
        self.extras = _Extras(run, scorers, scorer if embeds else None, options.max_error_rate)
        scorer.keeps_embeddings = embeds
        super().__init__(run, scorer, options, more=self.extras.sides)

    def annotate(self, part: Part, tasks: Tasks, attempt: int) -> list[dict[str, Any]]:
        self.extras.begin(part)
        return super().annotate(part, tasks, attempt)

    def shown(self, part: Part, rows: list[Decoded], answers: dict[int, Scores]) -> None:
        usable = [row for row in rows if row.facts["status"] in USABLE]
        shown = [
            ShownRow(
                row.number,
                dict(zip(self.setup.more, row.more, strict=False)),
                RowTexts(row.texts, [text.text for text in answers[row.number].syn]),
                answers[row.number].embedding,
            )
            for row in usable
        ]
        self.timed("models", lambda: self.extras.score(part, shown))
        for row in rows:
            row.more = []

    def commit(self, part: Part, rows: list[dict[str, Any]]) -> None:
        self.extras.commit(part, [row["sample_id"] for row in rows])
        super().commit(part, rows)


class _NoModels:
    """What a worker needs to know of models that are not there."""

    sides, device, batch_size = (), "none", 64


class LaterWorker(Worker):
    """Shows further scorers the rows of parts that captioner and filter have scored before."""

    def __init__(
        self,
        run: Run,
        embedder: Scorer | None,
        options: ScoreOptions,
        extras: _Extras,
        missing: dict[str, list[_Scored | _Embedded]],
    ) -> None:
        """Make a worker; `missing` are the scorers that each part still needs."""
        self.extras, self.missing = extras, missing
        self._embedder, self._decodes = embedder, bool(extras.sides or embedder)
        if not self._decodes:
            options = dataclasses.replace(options, decode_workers=0)
        super().__init__(run, embedder or _NoModels(), options, more=extras.sides)
        self.claims = Claims(run.storage, FAILURES)

    def begin(self, part: Part, attempt: int) -> Tasks:
        if self._decodes:
            return super().begin(part, attempt)
        self.claims.begin(part, attempt)
        return deque()

    def exists(self, part: Part) -> bool:
        return all(one.parts.exists(part.pid) for one in self.missing[part.pid])

    def annotate(self, part: Part, tasks: Tasks, attempt: int) -> list[dict[str, Any]]:
        self.extras.begin(part)
        table = self.run.parts.read(part.pid, ["sample_id", "status", "web_text", "syn_text"]).to_pylist()
        waiting: list[ShownRow] = []
        pixels: list[Item] = []
        for number, decoded in self._rows(part, tasks):
            row = table[number - part.lo]
            if row["status"] not in USABLE:
                continue
            images = dict(zip(self.setup.more, decoded.more, strict=False)) if decoded else {}
            waiting.append(ShownRow(number, images, RowTexts(row["web_text"] or [], row["syn_text"] or []), None))
            pixels.append(Item(row["sample_id"], decoded.pixels if decoded else [], []))
            if len(waiting) >= self.batch:
                self._show(part, waiting, pixels)
                waiting, pixels = [], []
        self._show(part, waiting, pixels)
        return [{**row, "status": self._status(part, row, number), "itm_web": (), "itm_syn": ()}
                for number, row in enumerate(table, part.lo)]  # fmt: skip

    def _rows(self, part: Part, tasks: Tasks) -> Any:
        """Yield the numbers of a part's rows, with the decoded row where images are needed."""
        if not self._decodes:
            yield from ((number, None) for number in range(part.lo, part.hi))
        while tasks:
            pool, task = tasks.popleft()
            for row in self.timed("decode", lambda pool=pool, task=task: pool.take(task)):
                yield row.number, row

    def _show(self, part: Part, rows: list[ShownRow], pixels: list[Item]) -> None:
        if self.stopped.is_set():
            raise ScoringInterrupted
        if self._embedder and EMBEDDING in (one.parts.scorer for one in self.missing[part.pid]):
            there = [i for i, item in enumerate(pixels) if item.pixels]
            embeddings = self.timed("models", lambda: self._embed([pixels[i] for i in there]))
            for i, embedding in zip(there, embeddings, strict=True):
                rows[i] = rows[i]._replace(embedding=embedding)
        self.timed("models", lambda: self.extras.score(part, rows, self.missing[part.pid]))

    def _embed(self, items: list[Item]) -> list[np.ndarray | None]:
        """Embed images, in halves where they do not fit together; None for one that does not fit alone."""
        if not items:
            return []
        try:
            return list(self._embedder.embed(items))
        except BatchTooLarge:
            if len(items) == 1:
                return [None]
        half = len(items) // 2
        return [*self._embed(items[:half]), *self._embed(items[half:])]

    def _status(self, part: Part, row: dict[str, Any], number: int) -> str:
        if row["status"] not in USABLE:
            return "not shown"
        return _RAISED if self.extras.raised(part, number) else row["status"]

    def commit(self, part: Part, rows: list[dict[str, Any]]) -> None:
        self.extras.commit(part, [row["sample_id"] for row in rows], self.missing[part.pid])
        self.claims.end(part)


# The passes ----------------------------------------------------------------------------------------------------------


def score_also(
    run: Run,
    also: Sequence[str],
    make_scorer: Callable[[Run], Scorer],
    options: ScoreOptions,
    device: str | None = None,
    out: TextIO | None = None,
) -> int:
    """Score what is left of a run with further scorers beside captioner and filter, then what only these still lack.

    Returns the exit status. DataError, before a model is loaded, if the run has the scores of other scorers.
    """
    out = out or sys.stderr
    scorers, embeds = load_scorers(also, device), EMBEDDING in also
    for scorer in scorers:
        ExtraParts(run.storage, scorer.name).claim(record_of(scorer))
    make_scorer = functools.cache(make_scorer)
    workers: list[SharingWorker] = []

    def make_worker(run: Run, scorer: Scorer, options: ScoreOptions) -> SharingWorker:
        workers.append(SharingWorker(run, scorer, options, scorers, embeds))
        return workers[-1]

    status = score(run, make_scorer, options, out, make_worker)
    if status == INTERRUPTED:
        return status
    for worker in workers:
        status = worker.extras.exit_status(out, status)
    later = _score_later(run, scorers, embeds, make_scorer, options, out)
    return later if status == DONE or later == INTERRUPTED else status


def _score_later(
    run: Run,
    scorers: Sequence[ExtraScorer],
    embeds: bool,
    make_scorer: Callable[[Run], Scorer],
    options: ScoreOptions,
    out: TextIO,
) -> int:
    present = run.parts.present()
    share = [part for part in share_of(run, options) if part.pid in present]
    names = [*(scorer.name for scorer in scorers), *([EMBEDDING] if embeds else [])]
    done, damaged = {}, {}
    for name in names:
        done[name], broken = ExtraParts(run.storage, name).whole(part.pid for part in share)
        damaged |= broken
    whole = {part.pid for part in share if all(part.pid in one for one in done.values())}
    work = sort_work(share, whole, damaged, Claims(run.storage, FAILURES))
    out.write(f"{', '.join(names)}: {len(work.done)} of {len(share)} parts are done; {len(work.todo)} to do\n")
    if not work.todo:
        return FAILED_PARTS if work.failed else DONE
    embedder = make_scorer(run) if embeds and any(part.pid not in done[EMBEDDING] for part, _ in work.todo) else None
    extras = _Extras(run, scorers, embedder, options.max_error_rate)
    missing = {
        part.pid: [one for one in extras.each if part.pid not in done[one.parts.scorer]] for part, _ in work.todo
    }
    progress = progress_of(work, out)
    status = score_parts(LaterWorker(run, embedder, options, extras, missing), options, work, progress)
    if status == DONE and progress.failed:
        out.write(f"{progress.failed} parts failed: see {run.where}/{FAILURES}; `capfilt retry-failed` releases them\n")
        status = FAILED_PARTS
    return extras.exit_status(out, status)
