"""Batches from worker processes; a worker's death, hang or error becomes one DataError that names the sample."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from blip.data.settings import DataConfig
from blip.errors import DataError, StuckSample
from blip.objectives.batch import Batch

logger = logging.getLogger(__name__)

_POLL = 2.0
"""Seconds between checks that the workers are alive."""
_SAMPLES, _SAMPLING = 10, 0.5
"""Number of samples of the workers' state, and the seconds they span, when a batch is overdue."""
_STUCK = 60.0
"""Seconds of CPU time after which a sample is given up. What can be counted before decoding is bounded in
blip.data.image_header; this is for the rest."""
_AHEAD = 2
"""Batches that torch lets a worker prepare in advance."""
_SHM = "/dev/shm"
_SHM_CURE = (
    f"They hand over batches through {_SHM}: give the container more of it (docker run --shm-size=8g, or --ipc=host), "
    "or set fewer data.workers; data.workers 0 needs none"
)


class Failure:
    """A worker's error as a message; not every exception can be passed between processes."""

    def __init__(self, message: str):
        self.message = message


def guarded(make: Callable[[], Batch], where: Callable[[], str]) -> Batch | Failure:
    """Make a batch; whatever is raised becomes a Failure that names the sample."""
    try:
        return _handed_over(make())
    except KeyboardInterrupt:
        raise
    except DataError as error:
        return Failure(str(error))
    except BaseException as error:  # SystemExit too: a worker that leaves in silence looks like one that was killed
        return Failure(f"{where()}: {type(error).__name__}: {error}")


def _handed_over(batch: Batch) -> Batch:
    """Put a worker's batch into shared memory; if it is full, torch's own thread would only print to stderr."""
    if get_worker_info() is not None:
        with _shared_memory(f"hand over a batch of {_bytes(batch):,} bytes"):
            for value in vars(batch).values():
                if isinstance(value, Tensor):
                    value.share_memory_()
    return batch


def _bytes(batch: Batch) -> int:
    return sum(value.nbytes for value in vars(batch).values() if isinstance(value, Tensor))


@contextlib.contextmanager
def _shared_memory(purpose: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DataError(f"data workers cannot {purpose}: {str(error).splitlines()[0]}. {_SHM_CURE}") from None


def _free_shared_memory() -> int | None:
    """Free bytes in /dev/shm; None if it does not exist."""
    try:
        return shutil.disk_usage(_SHM).free
    except OSError:
        return None


class Noted(NamedTuple):
    """Sample that a worker was last reading."""

    step: int
    """Number of the step; -1 if the key alone identifies the sample."""
    key: str
    """Key of the sample; empty before the first."""
    cpu: float
    """CPU seconds that the worker had used when it began the sample."""


class Reading:
    """Record of what each worker is reading, in shared memory, so that it is known after the worker's death."""

    def __init__(self, workers: int):
        self._numbers = torch.full((max(1, workers), 2), -1, dtype=torch.int64)
        self._keys = torch.zeros((max(1, workers), 256), dtype=torch.uint8)
        if workers:
            with _shared_memory("keep what they are reading in shared memory"):
                self._numbers.share_memory_(), self._keys.share_memory_()

    def note(self, key: str, step: int | None = None) -> None:
        info = get_worker_info()
        worker = info.id if info else 0
        text = key.encode("utf-8", "replace")[:255] + b"\0"
        self._numbers[worker, 0] = time.process_time_ns()  # first, or the sample would be charged for the one before
        if step is not None:
            self._numbers[worker, 1] = step
        self._keys[worker, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def of(self, worker: int) -> Noted:
        nanoseconds, step = self._numbers[worker].tolist()
        key = bytes(self._keys[worker].tolist()).split(b"\0", 1)[0].decode("utf-8", "ignore")
        return Noted(step, key, nanoseconds / 1e9)


def _as_it_is(batch: Batch | Failure) -> Batch | Failure:
    return batch


class Loader:
    """Iterate over batches, from the same first step each time. Raises DataError."""

    def __init__(
        self,
        data: Dataset,
        name: Callable[[int], str],
        length: int,
        config: DataConfig,
        reading: Reading,
        sampler: Iterable[list[tuple[int, int]]] | None = None,
    ):
        self._data, self._name, self._length = data, name, length
        self._config, self._reading, self._sampler = config, reading, sampler

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        room = _free_shared_memory()
        with _shared_memory("be started"):
            iterator = self._start()
        workers = getattr(iterator, "_workers", [])
        finished = False
        try:
            for number in range(self._length):
                batch = self._next(iterator, workers)
                if isinstance(batch, Failure):
                    raise DataError(batch.message)
                if number == 0 and workers and room is not None:
                    self._check_room(batch, room)
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
            prefetch_factor=_AHEAD if workers else None,
            collate_fn=_as_it_is,
            timeout=min(_POLL, c.worker_timeout) if workers else 0,
            worker_init_fn=_quiet,
            generator=torch.Generator(),  # or iterating would consume the global generator
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if forked else None,  # the table is shared, not copied
        )
        with _own_sigchld():
            return iter(loader)

    def _check_room(self, batch: Batch, room: int) -> None:
        """Report at the start that shared memory is too small, not later, when batches first pile up."""
        batches = min(self._length, _AHEAD * self._config.workers + 1)
        if batches * _bytes(batch) > room:
            raise DataError(
                f"{_SHM} is too small: {batches} batches of {_bytes(batch):,} bytes may be on their way at once, and "
                f"{room:,} bytes were free. {_SHM_CURE}"
            )

    def _next(self, iterator, workers: list) -> Batch | Failure:
        began, watch = time.monotonic(), _Watch(workers)
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
                watch.sample()
                self._refuse_stuck(watch)
                waited = time.monotonic() - began
                if waited >= self._config.worker_timeout:
                    if not watch.computing():
                        raise DataError(self._hangs(workers)) from None
                    logger.warning(
                        "no batch for %.0f s, in which the data workers got %.1f s of CPU time: the machine is "
                        "overloaded, and they wait for their turn behind everything else; waiting on",
                        waited,
                        watch.used(),
                    )
                    began, watch = time.monotonic(), _Watch(workers)

    def _refuse_stuck(self, watch: _Watch) -> None:
        """Raise DataError for a sample that has used up its CPU time, however long that took on this machine."""
        for number, spent in watch.cpu().items():
            noted = self._reading.of(number)
            if noted.cpu < 0 or spent - noted.cpu < _STUCK or noted != self._reading.of(number):
                continue
            if not noted.key:
                raise DataError(
                    f"data worker {number} has spent {spent - noted.cpu:.0f} s of CPU time at {self._name(number)} "
                    "without coming to a sample"
                )
            reason = f"decoding took more than {_STUCK:.0f} s of CPU time"
            raise StuckSample(f"data worker {number} is stuck at {noted.key}: {reason}", noted.key, reason)

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


class _Watch:
    """Monitor of workers while a batch is overdue: distinguishes busy decoders, a busy machine and slow storage."""

    def __init__(self, workers: list):
        self._processes: dict[int, psutil.Process] = {}
        for number, worker in enumerate(workers):
            with contextlib.suppress(psutil.Error):
                self._processes[number] = psutil.Process(worker.pid)
        self._began, self._samples, self._runnable = self.cpu(), 0, Counter[int]()

    def cpu(self) -> dict[int, float]:
        """Seconds of CPU time that each worker has used in all."""
        seconds = {}
        for number, process in self._processes.items():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds[number] = times.user + times.system
        return seconds

    def used(self) -> float:
        """Seconds of CPU time of all workers since this object was made."""
        return sum(spent - self._began.get(number, spent) for number, spent in self.cpu().items())

    def sample(self) -> None:
        """Note which workers compute, or would if it were their turn."""
        self._samples += 1
        for number, process in self._processes.items():
            with contextlib.suppress(psutil.Error):
                self._runnable[number] += process.status() == psutil.STATUS_RUNNING

    def computing(self) -> bool:
        """Whether a worker was runnable in most samples, rather than waiting for storage or for its peers."""
        for _ in range(_SAMPLES):
            self.sample()
            time.sleep(_SAMPLING / _SAMPLES)
        return 2 * max(self._runnable.values(), default=0) > self._samples


def _quiet(worker: int) -> None:
    """Protect a worker from signals meant for the training process, which wants to finish its step.

    Where the model computes on the same cores, a worker that takes one of them in the middle of a matrix product holds
    up all the others, so it works in the gaps (docs/log.md).
    """
    if not torch.cuda.is_available():
        os.nice(19)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _own_sigchld() -> Iterator[None]:
    """Remove torch's signal handler, which would raise in the middle of a training step when a worker dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _dead(workers: list, patience: float) -> tuple[int, int] | None:
    """Number and exit code of a worker that has ended; its connection may be lost before its death is visible."""
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
