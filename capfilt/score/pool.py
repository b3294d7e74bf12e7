"""Decoding in separate processes: ahead of the models, and isolated, so that a row that kills its decoder harms no one.

A worker sends one row at a time, so when it dies or hangs the row is known; it is tried once more in a new process and
then given up.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any

from PIL import Image

from blip import startup
from blip.errors import Stopped
from capfilt.reading import InputRow, Reader
from capfilt.score.decoding import Decoded, prepare
from capfilt.settings import ReadConfig, ScoreConfig
from capfilt.sources import PlannedSource
from capfilt.store.storage import open_storage

_START = 300.0
"""Seconds in which a decoding process has to start, even on a very slow file system."""


class BrokenDecoder(Stopped):
    """Decoding fails for every row, so the job cannot continue."""


@dataclass(frozen=True)
class Setup:
    """Settings of the run that a decoder needs."""

    where: str
    config: ScoreConfig
    reading: ReadConfig
    sides: tuple[int, ...]
    more: tuple[int, ...] = ()
    """Sizes of images for further scorers."""


@dataclass(frozen=True)
class DecodeTask:
    """Rows lo to hi of a source."""

    source: PlannedSource
    lo: int
    hi: int


class Decoder:
    """Reader and decoder of rows; keeps the readers of the last sources open."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self._storage = setup, open_storage(setup.where)
        self._readers: dict[str, Reader] = {}

    def run(self, task: DecodeTask) -> Iterator[Decoded]:
        """Decode the rows of a task. An unreadable row carries its error; a source that cannot be opened raises."""
        reader = self._reader(task.source)
        rows = reader.read(task.lo, task.hi)
        for number in range(task.lo, task.hi):
            try:
                row = next(rows)
            except ImportError as error:  # of the machine, not of the file
                raise BrokenDecoder(f"what reads {task.source.path} is missing: {error}") from None
            except Exception as error:  # whatever a damaged file makes its library raise
                problem = ("source_error", "unreadable", f"{type(error).__name__}: {error}")
                row = InputRow(number, str(number), problem=problem)
                rows = reader.read(number + 1, task.hi)
            yield prepare(row, self.setup.sides, self.setup.config, self.setup.more)

    def _reader(self, source: PlannedSource) -> Reader:
        if source.relpath not in self._readers:
            while len(self._readers) >= 4:
                self._readers.pop(next(iter(self._readers)))
            self._readers[source.relpath] = Reader(source, self.setup.reading, self._storage)
        return self._readers[source.relpath]


class Inline:
    """Decoding in this process, at submission: for tests and the smallest machines."""

    def __init__(self, setup: Setup) -> None:
        self._decoder = Decoder(setup)

    def submit(self, task: DecodeTask) -> Future:
        future: Future = Future()
        try:
            future.set_result(list(self._decoder.run(task)))
        except Exception as error:
            future.set_exception(error)
        return future

    def take(self, future: Future) -> list[Decoded]:
        return future.result()

    def discard(self, futures: Iterable[Future]) -> None:
        pass

    def close(self) -> None:
        pass


class Pool:
    """A pool of decoding processes.

    At most `ahead` submitted tasks are decoded before their rows are taken, in the order of submission.
    """

    def __init__(self, setup: Setup, workers: int, timeout: float, ahead: int = 8) -> None:
        self._setup, self._timeout = setup, timeout
        self._broken: BrokenDecoder | None = None
        self._room = threading.Semaphore(max(ahead, workers))
        self._tasks: queue.SimpleQueue[tuple[DecodeTask, Future] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._drive, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: DecodeTask) -> Future:
        future: Future = Future()
        self._tasks.put((task, future))
        return future

    def take(self, future: Future) -> list[Decoded]:
        """Wait for a task's rows and return them; makes room for another task."""
        try:
            return future.result()
        finally:
            self._room.release()

    def discard(self, futures: Iterable[Future]) -> None:
        """Cancel tasks whose rows will not be taken."""
        for future in futures:
            if not future.cancel():
                future.add_done_callback(lambda _: self._room.release())

    def close(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)
            self._room.release()

    def _drive(self) -> None:
        """Feed one process; after a crash or a hang, identify the row and continue with a new process."""
        process = _Process(self._setup)
        while True:
            self._room.acquire()  # before a task is taken, so that earlier tasks never wait for later ones
            one = self._tasks.get()
            if one is None:
                break
            task, future = one
            if not future.set_running_or_notify_cancel():
                self._room.release()
                continue
            try:
                if self._broken:
                    raise self._broken
                future.set_result(self._run(process, task))
            except Exception as error:
                if isinstance(error, BrokenDecoder):
                    self._broken = error
                future.set_exception(error)
        process.kill()

    def _run(self, process: _Process, task: DecodeTask) -> list[Decoded]:
        """Decode the rows of a task."""
        rows: list[Decoded] = []
        failed = None
        while (at := task.lo + len(rows)) < task.hi:
            outcome = process.run(DecodeTask(task.source, at, task.hi), self._timeout, rows)
            if outcome is None:
                break
            process.kill()
            at = task.lo + len(rows)
            if failed == at:
                rows.append(self._given_up(task.source, at, outcome))
            failed = at
        return rows

    def _given_up(self, source: PlannedSource, number: int, outcome: str) -> Decoded:
        """Return the row at which a decoder died or hung twice; reading its bytes and texts here is harmless."""
        try:
            row = next(Reader(source, self._setup.reading, open_storage(self._setup.where)).read(number, number + 1))
        except Exception:
            row = InputRow(number, str(number))
        code = {"crash": "decoder_crashed", "timeout": "decoder_timeout"}[outcome]
        image, row.image = row.image, None
        row.problem = (outcome, code, "the decoder died or hung on this row twice")
        done = prepare(row, (), self._setup.config)
        if image is not None:
            done.facts |= {"bytes": len(image), "image_sha256": hashlib.sha256(image).hexdigest()}
        return done


class _Process:
    """One decoding process and the pipe to it, which closes when either end dies; started when it is needed."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def run(self, task: DecodeTask, timeout: float, rows: list[Decoded]) -> str | None:
        """Append the task's rows as they come; returns None once all are there, else `crash` or `timeout`.

        Raises BrokenDecoder if no process can start, and whatever error the process reports of the source as a whole.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send(task)
            for _ in range(task.lo, task.hi):
                if not pipe.poll(timeout):
                    return "timeout"
                answer: Any = pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                rows.append(answer)
        except (EOFError, ConnectionError):
            return "crash"
        return None

    def _start(self) -> Connection:
        """Start the process, and wait until it has decoded a test image. BrokenDecoder says why it did not."""
        ours, theirs = socket.socketpair()
        self._pipe = pipe = Connection(ours.detach())
        with theirs, tempfile.TemporaryFile() as output, _standard_error() as errors:
            try:
                self._process = subprocess.Popen(
                    startup.python("capfilt.score.pool", str(theirs.fileno()), str(errors.fileno())),
                    pass_fds=[theirs.fileno(), errors.fileno()],
                    stdin=subprocess.DEVNULL,
                    stderr=output,
                    env={**startup.environment(), "OMP_NUM_THREADS": "1"},
                )
                theirs.close()
                pipe.send(self._setup)
                if pipe.poll(_START) and pipe.recv() == "ready":
                    return pipe
                reason = f"it did not come up within {_START:.0f} s"
            except (EOFError, ConnectionError):
                reason = "it ended at once"
            except OSError as error:
                reason = str(error)
            status = self.kill()
            lines = _tail(output)
        how = f" with status {status}" if status and status > 0 else f" by signal {-status}" if status else ""
        raise BrokenDecoder(f"decoding cannot start: {lines[-1] if lines else reason} ({sys.executable}{how})")

    def kill(self) -> int | None:
        """End the process; returns its exit status if it had ended by itself, else None."""
        status = None
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(0.1)
            self._process.kill()
            self._process.wait()
        if self._pipe:
            self._pipe.close()
        self._process = self._pipe = None
        return status


def _standard_error() -> IO[bytes]:
    """Duplicate this process's standard error; the null device where that is closed."""
    try:
        return os.fdopen(os.dup(2), "wb", buffering=0)
    except OSError:
        return open(os.devnull, "wb", buffering=0)


def _tail(file: IO[bytes]) -> list[str]:
    """Return the last lines of a process's output."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _serve(handle: int, errors: int) -> None:
    """Run a decoding process: tasks in, rows out, until the pipe closes.

    Until it is ready, the parent reports errors; from then on it may do so itself.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    pipe = Connection(handle)
    with contextlib.suppress(EOFError, ConnectionError):
        decoder = Decoder(pipe.recv())
        _try_out()
        os.dup2(errors, 2)
        pipe.send("ready")
        while True:
            task = pipe.recv()
            try:
                for row in decoder.run(task):
                    pipe.send(row)
            except (EOFError, ConnectionError):
                raise
            except BrokenDecoder as error:
                pipe.send(error)
            except Exception as error:
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _try_out() -> None:
    """Decode a valid image. RuntimeError if that does not work here."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "JPEG")
    done = prepare(InputRow(0, "", file.getvalue(), ["a red square"]), (8,), ScoreConfig(scorer="fake"))
    if done.facts["status"] != "ok":
        raise RuntimeError(f"a sound image is not decoded: {done.facts['error_detail']}")


if __name__ == "__main__":
    from capfilt.score import pool  # so that what is sent is of the same module on both sides

    pool._serve(*map(int, sys.argv[1:]))
