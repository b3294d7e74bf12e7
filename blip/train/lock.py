"""One writer per run directory."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from blip import dist
from blip.errors import Stopped
from blip.processes import started

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_BEATS, _STALE = 10.0, 60.0
"""Seconds between touches of the lock file, and without a touch after which another machine's lock is void."""


class RunLocked(Stopped):
    """Another process writes to this run directory."""


class RunLock:
    """One writer per run directory.

    A POSIX record lock decides on a local disk and, where its lock service runs, on NFS: the kernel releases it when
    the holder dies, and no child inherits it. For file systems without one, the file names its holder and is touched
    every few seconds. On Windows filelock's lock, on a file of its own, takes the place of the record lock.
    """

    _locked_here: set[Path] = set()  # noqa: RUF012 - a record lock does not stop its own process

    def __init__(self, out: Path) -> None:
        self.path = out / "run.lock"
        self._stop = threading.Event()
        self._system_lock: Any = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._key = self.path.resolve()
        if self._key in self._locked_here:
            raise RunLocked(f"{self.path.parent} is already written to by this process ({os.getpid()})")
        self._file = self.path.open("a+")
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        self._locked_here.add(self._key)
        self._write({"pid": os.getpid(), "host": socket.gethostname(), "started": started(os.getpid())})
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._write(None)
        self._locked_here.discard(self._key)
        self._file.close()
        if self._system_lock is not None:
            self._system_lock.release()

    def check(self) -> None:
        """Raise RunLocked if the folder was removed or replaced: it may belong to another process now."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # a file system that is away for a moment is no other folder
            return
        raise RunLocked(
            f"{self.path.parent} was removed or replaced while this run was writing to it, and another run may write "
            "there now, so this one stops writing. Start it again, or give it another directory"
        )

    def _take(self) -> None:
        try:
            certain = self._take_of_the_system()
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RunLocked(self._refusal(self._read() or {})) from None
            certain = False
        holder = self._read()
        if holder is None:
            return
        age = time.time() - self.path.stat().st_mtime
        here = holder.get("host") == socket.gethostname()
        alive = (not certain and started(holder.get("pid", 0)) == holder.get("started")) if here else age < _STALE
        if alive:
            raise RunLocked(self._refusal(holder))
        logger.warning("taking over the lock of process %s on %s, which is gone", holder.get("pid"), holder.get("host"))

    def _take_of_the_system(self) -> bool:
        """Take the system's lock for the life of this process; OSError if another has it or none exist."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        import filelock

        self._system_lock = filelock.FileLock(f"{self.path}.held", timeout=0)
        try:
            self._system_lock.acquire()
        except filelock.Timeout:
            raise OSError(errno.EAGAIN, "another process has the lock") from None
        return True

    def _refusal(self, holder: dict) -> str:
        return (
            f"{self.path.parent} is written to by process {holder.get('pid', 'unknown')} "
            f"on {holder.get('host', 'unknown')}: stop it first, or give this run another directory"
        )

    def _read(self) -> dict | None:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
        except ValueError:
            return None
        return holder if isinstance(holder, dict) else None

    def _write(self, holder: dict | None) -> None:
        self._file.seek(0)
        self._file.truncate()
        if holder:
            self._file.write(json.dumps(holder))
        self._file.flush()

    def _beat(self) -> None:
        while not self._stop.wait(_BEATS):
            try:
                self.check()
                os.utime(self.path)
            except (OSError, RunLocked):
                logger.warning("cannot touch %s", self.path)


@contextmanager
def only_writer(out: Path) -> Iterator[RunLock | None]:
    """Hold the run's lock in the main process, which gets it; all processes raise RunLocked if it is taken."""
    with ExitStack() as stack:
        refusal = lock = None
        if dist.is_main():
            try:
                lock = stack.enter_context(RunLock(out))
            except RunLocked as error:
                refusal = str(error)
        refusal = dist.from_main(refusal)
        if refusal:
            raise RunLocked(refusal)
        yield lock
