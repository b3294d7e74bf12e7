"""The scoring loop: missing parts are decoded ahead, scored by the models, and committed one by one."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TextIO

from blip.errors import DataError
from blip.processes import cores
from capfilt import __version__
from capfilt.extra.scorer import WrongScorer
from capfilt.run import Part, Run
from capfilt.schema import FAULTS, OK
from capfilt.score import annotate
from capfilt.score.claims import MOST, SANDBOX, Claims
from capfilt.score.decoding import Decoded
from capfilt.score.pool import BrokenDecoder, DecodeTask, Inline, Pool, Setup
from capfilt.score.progress import ScoringProgress
from capfilt.score.scorer import BatchTooLarge, Item, Scorer, Scores
from capfilt.settings import DONE, FAILED_PARTS, INTERRUPTED, WRONG, ScoreOptions
from capfilt.sources import changed
from capfilt.store.storage import host

_CHUNK = 16
"""Rows per decoding task."""
_JUDGED = 2000
"""Number of rows after which the error rate is checked."""


Tasks = deque[tuple["Pool | Inline", Future]]
"""The decoding tasks of a part, each with its pool."""


class ScoringInterrupted(Exception):
    """The process was asked to stop."""


class TooManyErrors(DataError):
    """Too many rows fail; the input is probably the wrong one."""


class Worker:
    """Score parts with one scorer; every engine calls it."""

    def __init__(
        self,
        run: Run,
        scorer: Scorer,
        options: ScoreOptions,
        pool: Pool | Inline | None = None,
        more: tuple[int, ...] = (),
    ) -> None:
        """Make a worker; `more` are sizes of images that are decoded besides those that the scorer needs."""
        self.run, self.scorer, self.options = run, scorer, options
        self.setup = Setup(run.where, run.config, run.reading, scorer.sides, more)
        self.batch = self.most = options.batch or scorer.batch_size
        self._passed, self._wait = 0, 1
        self.pool = pool or make_pool(self.setup, options, self.batch)
        self.claims: Any = Claims(run.storage)
        self.stages: dict[str, float] = {"decode": 0.0, "models": 0.0, "commit": 0.0}
        self.stopped = threading.Event()
        self._sandbox: Pool | None = None

    def begin(self, part: Part, attempt: int) -> Tasks:
        """Start decoding a part. DataError if its source is not what was planned."""
        source = self.run.sources[part.source]
        reason = changed(source)
        if reason:
            self.claims.fail(part, "source_changed", reason)
            raise DataError(f"source_changed: {source.path}: {reason}")
        self.claims.begin(part, attempt)
        pool = self._careful() if attempt >= SANDBOX and isinstance(self.pool, Inline) else self.pool
        chunks = (DecodeTask(source, lo, min(lo + _CHUNK, part.hi)) for lo in range(part.lo, part.hi, _CHUNK))
        return deque((pool, pool.submit(chunk)) for chunk in chunks)

    def _careful(self) -> Pool:
        self._sandbox = self._sandbox or Pool(self.setup, 1, self.options.decode_timeout)
        return self._sandbox

    def annotate(self, part: Part, tasks: Tasks, attempt: int) -> list[dict[str, Any]]:
        """Return the annotations of a part's rows, in order."""
        start = time.monotonic()
        rows: list[Decoded] = []
        answers: dict[int, Scores] = {}
        for batch, following in itertools.pairwise(itertools.chain(self._batches(tasks, rows), [[]])):
            self._score(batch, following, part, answers)
        annotations = [annotate.annotation(row, part.source, answers.get(row.number)) for row in rows]
        about = {
            "attempt": attempt,
            "worker": f"{host()}:{os.getpid()}",
            "device": self.scorer.device,
            "dtype": self.run.config.precision,
            "seconds": (time.monotonic() - start) / len(rows),
        }
        return [{**row, **about} for row in annotations]

    def _batches(self, tasks: Tasks, rows: list[Decoded]) -> Iterator[list[Decoded]]:
        """Add a part's rows to `rows` as they are decoded; yield those with images in batches."""
        waiting: list[Decoded] = []
        while tasks:
            pool, task = tasks.popleft()
            for row in self.timed("decode", lambda pool=pool, task=task: pool.take(task)):
                rows.append(row)
                if row.pixels:
                    waiting.append(row)
                if len(waiting) >= self.batch:
                    yield waiting
                    waiting = []
        if waiting:
            yield waiting

    def _score(self, rows: list[Decoded], following: list[Decoded], part: Part, answers: dict[int, Scores]) -> None:
        """Score rows and record their scores in `answers`; the scorer may begin with the `following` ones meanwhile."""
        if following:
            items = [annotate.item_of(row, part.source) for row in following[: self.batch]]
            self.timed("models", lambda: self.scorer.ahead(items))
        at = 0
        while at < len(rows):
            some = rows[at : at + self.batch]
            at += len(some)
            for row, scores in zip(some, self.show([annotate.item_of(row, part.source) for row in some]), strict=True):
                row.pixels = []
                if scores is None:
                    annotate.out_of_memory(row)
                else:
                    annotate.check_finite(row, scores)
                    answers[row.number] = scores
            self.shown(part, some, answers)

    def shown(self, part: Part, rows: list[Decoded], answers: dict[int, Scores]) -> None:
        """Take note of rows that have been scored, with their images still at hand."""

    def show(self, items: Sequence[Item]) -> list[Scores | None]:
        """Score items, in halves where they do not fit together; None for one that does not fit alone.

        The batch is halved for what comes after unless only one of the halves is to blame, and doubled again when some
        have passed: later after each time that this was too early.
        """
        scores = self._try(items)
        if scores is not None:
            self._passed += len(items) >= self.batch
            if self.batch == self.most:
                self._wait = max(1, self._wait // 2)
            self._grow()
            return scores
        halves = [self._fitted(half) for half in _halves(items)]
        fitted = [fits for _, fits in halves]
        if len(items) == self.batch and fitted[0] == fitted[1]:
            self.batch, self._passed, self._wait = (self.batch + 1) // 2, sum(fitted), min(2 * self._wait, 64)
            self._grow()
        return [scores for some, _ in halves for scores in some]

    def _grow(self) -> None:
        if self.batch < self.most and self._passed >= self._wait:
            self.batch, self._passed = min(self.most, 2 * self.batch), 0

    def _fitted(self, items: Sequence[Item]) -> tuple[list[Scores | None], bool]:
        """Score items; also returns whether they fit together."""
        scores = self._try(items)
        if scores is not None:
            return scores, True
        return [scores for half in _halves(items) for scores in self._fitted(half)[0]], False

    def _try(self, items: Sequence[Item]) -> list[Scores | None] | None:
        """Score items; None if several do not fit into memory, [None] if a single one does not."""
        if self.stopped.is_set():
            raise ScoringInterrupted
        try:
            return self.timed("models", lambda: self.scorer.score(items))
        except BatchTooLarge:
            return None if len(items) > 1 else [None]

    def exists(self, part: Part) -> bool:
        """Tell whether a part is done, by this process or another."""
        return self.run.parts.exists(part.pid)

    def commit(self, part: Part, rows: list[dict[str, Any]]) -> None:
        """Write a part's annotations."""
        facts = {
            "fingerprint": self.run.fingerprint,
            "seed": str(self.run.config.seed),
            "code": __version__,
            **self.scorer.facts,
        }
        self.run.parts.commit(part.pid, annotate.table_of(rows, part), facts)
        self.claims.end(part)

    def stop(self) -> None:
        """Stop before the next batch; if called again, at once."""
        if self.stopped.is_set():
            raise KeyboardInterrupt
        self.stopped.set()

    def discard(self, tasks: Tasks) -> None:
        """Cancel the rest of a part's decoding."""
        while tasks:
            pool, task = tasks.popleft()
            pool.discard([task])

    def timed(self, stage: str, action: Callable[[], Any]) -> Any:
        start = time.monotonic()
        try:
            return action()
        finally:
            self.stages[stage] += time.monotonic() - start

    def close(self) -> None:
        self.pool.close()
        if self._sandbox:
            self._sandbox.close()


def _halves(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    half = (len(items) + 1) // 2
    return items[:half], items[half:]


def make_pool(setup: Setup, options: ScoreOptions, batch: int) -> Pool | Inline:
    """Make a decoding pool that stays two batches ahead."""
    workers = options.decode_workers
    if workers is None:
        mine = min(cores(), int(os.environ.get("SLURM_CPUS_PER_TASK") or cores()))
        workers = max(1, min(16, mine // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    ahead = 2 * workers + 2 * -(-batch // _CHUNK)
    return Pool(setup, workers, options.decode_timeout, ahead) if workers else Inline(setup)


# Parts to score -------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """State of a process's share of the parts, and the parts left to score."""

    todo: deque[tuple[Part, int]]
    """Parts with the number of the next attempt, the untried first."""
    share: list[Part]
    done: set[str]
    damaged: dict[str, str]
    busy: set[str]
    failed: list[Part]


def share_of(run: Run, options: ScoreOptions) -> list[Part]:
    """Return the parts of this process, up to the limit."""
    share = run.share(options.rank, options.world)
    if options.limit:
        rows = itertools.accumulate(part.rows for part in share)
        share = [
            part for part, upto in zip(share, rows, strict=True) if upto - part.rows < options.limit / options.world
        ]
    return share


def find_work(run: Run, options: ScoreOptions, claims: Claims) -> Work:
    """Sort this process's share into parts that are done, damaged, busy elsewhere, failed, and to do."""
    share = share_of(run, options)
    return sort_work(share, *run.parts.whole(part.pid for part in share), claims)


def sort_work(share: list[Part], done: set[str], damaged: dict[str, str], claims: Claims) -> Work:
    """Sort parts into those that are done, damaged, busy elsewhere, failed, and to do."""
    left = [part for part in share if part.pid not in done]
    attempts, busy = claims.attempts(part.pid for part in left)
    failed = [part for part in left if attempts.get(part.pid, 0) >= MOST]
    todo = [(part, attempts.get(part.pid, 0) + 1) for part in left if part not in failed]
    todo.sort(key=lambda one: (one[0].pid in busy, one[1], one[0].pid))
    return Work(deque(todo), share, done, damaged, busy, failed)


def describe_work(run: Run, work: Work, options: ScoreOptions) -> str:
    """Describe the state of the parts in one line."""
    whose = f"process {options.rank} of {options.world}: " if options.world > 1 else ""
    line = f"{whose}{len(work.done)} of {len(work.share)} parts are done"
    if work.damaged:
        line += f", {len(work.damaged)} damaged and done again ({next(iter(work.damaged.items()))})"
    if work.busy:
        line += f", {len(work.busy)} in the hands of another process, which is fine"
    if work.failed:
        line += f", {len(work.failed)} failed {MOST} times (`{run.command('retry-failed')}` tries them again)"
    return line + f"; {len(work.todo)} to do"


# The loop -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_stop(handle: Callable[[], None]) -> Iterator[None]:
    """While entered, SIGTERM and SIGINT call a function; only in the main thread, which alone gets signals."""
    here = threading.current_thread() is threading.main_thread()
    names = (signal.SIGTERM, signal.SIGINT) if here else ()
    before = {number: signal.signal(number, lambda *_: handle()) for number in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def score(
    run: Run,
    make_scorer: Callable[[Run], Scorer],
    options: ScoreOptions | None = None,
    out: TextIO | None = None,
    make_worker: Callable[[Run, Scorer, ScoreOptions], Worker] = Worker,
) -> int:
    """Score what is left of a run, or of this process's share of it; returns the exit status.

    TooManyErrors if the input is probably the wrong one, StorageError when nothing can be written.
    """
    options, out = options or ScoreOptions(), out or sys.stderr
    run.storage.sweep()
    work = find_work(run, options, Claims(run.storage))
    out.write(describe_work(run, work, options) + "\n")
    out.flush()
    progress = progress_of(work, out)
    if work.todo:
        status = score_parts(make_worker(run, make_scorer(run), options), options, work, progress)
        if status != DONE:
            return status
    else:
        progress.say(always=True)
    return exit_status(run, options, progress.failed, out)


def progress_of(work: Work, out: TextIO) -> ScoringProgress:
    """Return the progress of a process before it begins."""
    rows = sum(part.rows for part in work.share)
    inherited = sum(part.rows for part in work.share if part.pid in work.done)
    progress = ScoringProgress(rows, inherited, len(work.share), len(work.done), out)
    progress.failed = len(work.failed)
    return progress


def exit_status(run: Run, options: ScoreOptions, failed: int, out: TextIO) -> int:
    """Return 3 if parts failed, 2 if sources are damaged and that was not allowed, else 0; prints the reason."""
    if failed:
        out.write(f"{failed} parts failed: see {run.where}/failures; `capfilt retry-failed` releases them\n")
        return FAILED_PARTS
    if options.max_error_rate < 1 and (statuses := _all_failed(run, options)):
        out.write(
            f"none of {statuses.total():,} rows could be used ({_commonest(statuses)}); check column, folder and image "
            "root, or give --max-error-rate 1 to continue anyway\n"
        )
        return WRONG
    damaged = run.damaged()
    for source in damaged[:3]:
        out.write(f"source_damaged: {source.path}: {source.damage}\n")
    if damaged and not options.allow_damaged:
        out.write(f"{len(damaged)} of {len(run.sources)} sources are damaged; --allow-damaged accepts that\n")
        return WRONG
    return DONE


def _all_failed(run: Run, options: ScoreOptions) -> Counter[str]:
    """Count the statuses of this process's rows if none could be used; empty if one could (usually in the first part).

    For jobs of a few rows; in a large job `judge` reports this early.
    """
    statuses: Counter[str] = Counter()
    for part in run.share(options.rank, options.world):
        if run.parts.exists(part.pid):  # not a list of all: the first part nearly always answers
            statuses.update(run.parts.read(part.pid, ["status"])["status"].to_pylist())
            if not statuses.keys() <= FAULTS:
                return Counter()
    return statuses


def _commonest(statuses: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in statuses.most_common(4) if name != OK)


def score_parts(worker: Worker, options: ScoreOptions, work: Work, progress: ScoringProgress) -> int:
    """Score the parts that are to do; returns DONE or INTERRUPTED."""
    progress.stages = worker.stages
    judged = min(_JUDGED, sum(part.rows for part, _ in work.todo))
    with on_stop(worker.stop), ThreadPoolExecutor(1) as writer:
        writing: deque[Future] = deque()
        try:
            for part, attempt, tasks in _ahead(worker, work, progress):
                rows = _try(worker, part, attempt, tasks, work, progress)
                if rows is None:
                    continue
                progress.add(rows)
                writing.append(writer.submit(worker.commit, part, rows))
                judge(progress, judged, options)  # after the part is on its way: its work is not lost
                while len(writing) > 2 or (writing and writing[0].done()):
                    worker.timed("commit", writing.popleft().result)
                progress.say()
            for one in writing:
                one.result()
        except (ScoringInterrupted, KeyboardInterrupt):
            for one in writing:
                one.result()
            progress.out.write(
                f"\ninterrupted; the same command continues with {len(work.share)} parts minus those done\n"
            )
            return INTERRUPTED
        finally:
            worker.claims.release()
            worker.close()
    progress.say(always=True)
    return DONE


def _ahead(worker: Worker, work: Work, progress: ScoringProgress) -> Iterator[tuple[Part, int, Tasks]]:
    """Yield parts whose decoding has begun, one part ahead of the one being scored."""
    begun: deque[tuple[Part, int, Tasks]] = deque()
    deferred: set[str] = set()
    while work.todo or begun:
        while work.todo and len(begun) < 2:
            part, attempt = work.todo.popleft()
            if worker.stopped.is_set():
                raise ScoringInterrupted
            if worker.exists(part) and part.pid not in work.damaged:
                progress.inherit(part.rows)  # another process was faster
                continue
            if part.pid not in deferred and part.pid in worker.claims.attempts([part.pid])[1]:
                deferred.add(part.pid)
                work.todo.append((part, attempt))
                continue
            try:
                begun.append((part, attempt, worker.begin(part, attempt)))
            except DataError as error:
                progress.failed += 1
                progress.out.write(f"{error}\n")
            if isinstance(worker.pool, Inline):
                break  # decoding in this process cannot run ahead
        if begun:
            yield begun.popleft()


def _try(
    worker: Worker, part: Part, attempt: int, tasks: Tasks, work: Work, progress: ScoringProgress
) -> list[dict[str, Any]] | None:
    """Annotate a part; None if that raised an error: the part is then queued again, or has failed."""
    try:
        return worker.annotate(part, tasks, attempt)
    except (ScoringInterrupted, KeyboardInterrupt, WrongScorer):
        raise
    except BrokenDecoder:  # neither the part's fault nor a row's
        worker.discard(tasks)
        if worker.stopped.is_set():  # the signal that stopped this process has ended the other one
            raise ScoringInterrupted from None
        raise
    except Exception as error:
        worker.discard(tasks)
        worker.claims.fail(part, "exception", f"{type(error).__name__}: {error}", error)
        if attempt >= MOST:
            progress.failed += 1
            progress.out.write(f"part {part.pid} ({part.source} rows {part.lo} to {part.hi}) failed: {error}\n")
        else:
            progress.retried += 1
            work.todo.append((part, attempt + 1))
        return None


def judge(progress: ScoringProgress, judged: int, options: ScoreOptions) -> None:
    """Raise TooManyErrors before much work is done on the wrong column or folder."""
    if progress.seen < judged or judged < 200 or progress.seen - judged > _JUDGED:
        return
    rate = progress.errors / progress.seen
    if rate > options.max_error_rate:
        raise TooManyErrors(
            f"{rate:.0%} of the first {progress.seen} rows cannot be used ({_commonest(progress.statuses)}); check "
            f"column, folder and image root, or give --max-error-rate {min(1.0, rate + 0.05):.2f} to continue anyway"
        )
