"""Batches by step number: what step s shows is a function of (seed, s, process), whatever the number of workers.

Reading happens in processes that may die, hang or raise anything; here that becomes one DataError that says which
worker and which sample.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from blip.config import DataConfig
from blip.data.batch import Batch
from blip.data.errors import DataError
from blip.data.pairs import Pairs, Sample

_POLL = 2.0
"""Seconds between looks at whether the workers still live."""


class Failure:
    """An error that a worker ran into, as a message: not every exception survives the way between processes."""

    def __init__(self, message: str):
        self.message = message


def guarded(make: Callable[[], Batch], where: Callable[[], str]) -> Batch | Failure:
    """Make a batch; whatever is raised becomes a Failure that names the sample."""
    try:
        return make()
    except KeyboardInterrupt:
        raise
    except DataError as error:
        return Failure(str(error))
    except BaseException as error:  # SystemExit too: a worker that leaves in silence looks like one that was killed
        return Failure(f"{where()}: {type(error).__name__}: {error}")


class Progress:
    """What each worker is reading, in shared memory, so that it is known after the worker's death."""

    def __init__(self, workers: int, fields: int = 2):
        self._at = torch.full((max(1, workers), fields), -1, dtype=torch.int64).share_memory_()

    def note(self, *values: int) -> None:
        info = get_worker_info()
        self._at[info.id if info else 0] = torch.tensor(values)

    def of(self, worker: int) -> list[int]:
        return self._at[worker].tolist()


class _Batches(Dataset):
    """Draws -> Batch or Failure, in a worker."""

    def __init__(self, pairs: Pairs, progress: Progress):
        self.pairs, self.progress = pairs, progress

    def __getitems__(self, draws: list[tuple[int, int]]) -> Batch | Failure:
        p = self.pairs
        return guarded(lambda: p.collate([self._read(d) for d in draws]), self._where)

    def _read(self, draw: tuple[int, int]) -> Sample:
        self.progress.note(*draw)
        return self.pairs[draw]

    def _where(self) -> str:
        info = get_worker_info()
        return self.name(info.id if info else 0)

    def name(self, worker: int) -> str:
        epoch, index = self.progress.of(worker)
        return self.pairs.key(index) if epoch >= 0 else "its first sample"


def _as_it_is(batch: Batch | Failure) -> Batch | Failure:
    return batch


class Steps:
    """The draws of each step of one process: positions (s * world + rank) * batch_size ... of the endless stream."""

    def __init__(self, pairs: Pairs, *, batch_size: int, rank: int, world: int, start: int, steps: int):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} processes")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.pairs, self.batch_size, self.rank, self.world = pairs, batch_size, rank, world
        self.start, self.steps = start, steps

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            yield self.draws(step)

    def draws(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of each pair of a step."""
        n, first = len(self.pairs), (step * self.world + self.rank) * self.batch_size
        return [(p // n, int(self.pairs.order(p // n)[p % n])) for p in range(first, first + self.batch_size)]


class Loader:
    """Iterates over Batch, from the same first step each time. Raises DataError."""

    def __init__(self, data: Dataset, name: Callable[[int], str], length: int, config: DataConfig, sampler=None):
        self._data, self._name, self._length = data, name, length
        self._config, self._sampler = config, sampler

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        iterator = self._start()
        workers = getattr(iterator, "_workers", [])
        finished = False
        try:
            for _ in range(self._length):
                batch = self._next(iterator, workers)
                if isinstance(batch, Failure):
                    raise DataError(batch.message)
                yield batch
            finished = True
        finally:
            if not finished:
                _kill(workers)

    def _start(self):
        c, workers = self._config, self._config.workers
        forked = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        loader = DataLoader(
            self._data,
            batch_sampler=self._sampler,
            **({} if self._sampler is not None else {"batch_size": None}),
            num_workers=workers,
            collate_fn=_as_it_is,
            timeout=min(_POLL, c.worker_timeout) if workers else 0,
            worker_init_fn=_quiet,
            generator=torch.Generator(),  # or iterating would consume the global generator
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if forked else None,  # the table is shared, not copied
        )
        with _own_sigchld():
            return iter(loader)

    def _next(self, iterator, workers: list) -> Batch | Failure:
        began = time.monotonic()
        while True:
            try:
                return next(iterator)
            except StopIteration:
                raise DataError("the workers stopped before the last step") from None
            except Exception as error:
                timed_out = "timed out" in str(error)
                dead = _dead(workers, patience=0.0 if timed_out else 1.0)
                if dead:
                    raise DataError(self._died(*dead)) from None
                if not timed_out:
                    raise DataError(f"reading failed: {type(error).__name__}: {error}") from error
                if time.monotonic() - began >= self._config.worker_timeout:
                    raise DataError(self._hangs(workers)) from None

    def _died(self, worker: int, code: int) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        hint = {-signal.SIGKILL: ": probably out of memory", -signal.SIGBUS: ": probably /dev/shm is full"}.get(
            code, ""
        )
        return f"data worker {worker} {how}{hint}, while it read {self._name(worker)}"

    def _hangs(self, workers: list) -> str:
        at = "; ".join(f"worker {i} at {self._name(i)}" for i in range(len(workers)))
        return (
            f"no batch for {self._config.worker_timeout:g} s ({at}); if the storage is slow, "
            "raise data.worker_timeout or data.workers"
        )


def _quiet(worker: int) -> None:
    """Signals meant for the training process, which wants to finish its step, must not kill its workers.

    Where the model computes on the same cores, a worker that takes one of them in the middle of a matrix product holds
    up all the others, so it works in the gaps (docs/log.md).
    """
    if not torch.cuda.is_available():
        os.nice(19)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _own_sigchld() -> Iterator[None]:
    """Take back torch's handler, which would raise in the middle of a training step when a worker dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _dead(workers: list, patience: float) -> tuple[int, int] | None:
    """The number and exit code of a worker that has ended; a lost connection can be seen before the death is."""
    until = time.monotonic() + patience
    while True:
        for number, worker in enumerate(workers):
            if worker.exitcode is not None:
                return number, worker.exitcode
        if time.monotonic() >= until:
            return None
        time.sleep(0.02)


def _kill(workers: list) -> None:
    """End workers that may hang in a system call or ignore a polite signal."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=1)


def make_loader(
    pairs: Pairs, *, batch_size: int, rank: int, world: int, start: int, steps: int, config: DataConfig, seed: int
) -> Loader:
    """Batches of steps `start` to `steps` of process `rank` of `world`; every step has exactly `batch_size` pairs.

    Step s of process r holds positions (s * world + r) * batch_size ... of the endless stream whose position p is
    draw p % N of epoch p // N. A gradient-accumulation micro-batch counts as one step here. The global random
    generators are never consumed. Raises ValueError if `seed` is not that of `pairs`.
    """
    if seed != pairs.seed:
        raise ValueError(f"the loader's seed {seed} is not the pairs' seed {pairs.seed}")
    progress = Progress(config.workers)
    data = _Batches(pairs, progress)
    sampler = Steps(pairs, batch_size=batch_size, rank=rank, world=world, start=start, steps=steps)
    return Loader(data, data.name, len(sampler), config, sampler)


class Feed:
    """Pairs as the training loop asks for them."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, start: int, count: int, rank: int, world: int, batch_size: int) -> Loader:
        """Batches `start` to `start + count` - 1 of one process."""
        p = self.pairs
        span = {"start": start, "steps": start + count}
        return make_loader(p, batch_size=batch_size, rank=rank, world=world, **span, config=p.config, seed=p.seed)
