"""Notes on parts in progress, which show afterwards where a process died.

A note is no lock: two processes that score the same part replace equal content with equal content. It counts attempts,
and lets processes on one machine keep out of each other's way.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterable

from blip.processes import started
from capfilt.run import Part
from capfilt.store.parts import FAILURES, failure_name, failures, read_failure
from capfilt.store.storage import Storage, host

SANDBOX, MOST = 2, 5
"""Attempt from which decoding runs in another process, and number of attempts after which a part has failed."""
_FRESH = 600.0
"""Seconds for which another machine's note counts as a living process's."""


class Claims:
    """The notes of one process."""

    def __init__(self, storage: Storage, folder: str = FAILURES) -> None:
        self.storage, self._folder = storage, folder
        self._mine: dict[str, int] = {}
        self._start = started(os.getpid())

    def attempts(self, wanted: Iterable[str]) -> tuple[dict[str, int], set[str]]:
        """Return the highest unsuccessful attempt of each part, and the parts that others are working on now."""
        wanted = set(wanted)
        counts: dict[str, int] = {}
        busy: set[str] = set()
        for pid, numbers in failures(self.storage, self._folder).items():
            if pid not in wanted or pid in self._mine:
                continue
            numbers = [n for n in numbers if n > 0]
            if numbers and self._alive(read_failure(self.storage, pid, max(numbers), self._folder)):
                busy.add(pid)
                numbers.remove(max(numbers))
            counts[pid] = max(numbers, default=0)
        return counts, busy

    def _alive(self, note: dict) -> bool:
        if note.get("state") != "begun":
            return False
        if note.get("host") != host():
            return time.time() - float(note.get("time", 0)) < _FRESH
        return started(int(note.get("process", 0))) == note.get("started")

    def begin(self, part: Part, attempt: int) -> None:
        self._mine[part.pid] = attempt
        self._note(part, attempt, {"state": "begun"})

    def end(self, part: Part) -> None:
        """Drop the claim on a part that is committed or was released on purpose."""
        attempt = self._mine.pop(part.pid, None)
        if attempt is not None:
            self.storage.remove(failure_name(part.pid, attempt, self._folder))

    def fail(self, part: Part, code: str, detail: str, error: BaseException | None = None) -> None:
        """Record why a part could not be scored. A changed source does not count as an attempt."""
        attempt = self._mine.pop(part.pid, 0)
        trace = "".join(traceback.format_exception(error)) if error else None
        self._note(part, attempt, {"state": "failed", "code": code, "detail": detail, "traceback": trace})

    def release(self) -> None:
        """Release all claims after an interruption; it does not count as a failed attempt."""
        for pid, attempt in list(self._mine.items()):
            self.storage.remove(failure_name(pid, attempt, self._folder))
        self._mine.clear()

    def _note(self, part: Part, attempt: int, what: dict) -> None:
        record = {
            **what,
            "part": part.pid,
            "attempt": attempt,
            "source": part.source,
            "rows": [part.lo, part.hi],
            "host": host(),
            "process": os.getpid(),
            "started": self._start,
            "time": time.time(),
        }
        self.storage.note(failure_name(part.pid, attempt, self._folder), json.dumps(record).encode())
