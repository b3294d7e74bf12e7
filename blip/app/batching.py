"""One thread for a model that many clients share: requests of one kind that wait together go through it together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


class BusyError(Exception):
    """As many requests wait as are allowed to."""


@dataclass(eq=False)
class Ticket:
    """A place in the queue, taken before a request's work is known."""

    kind: Hashable = None
    item: Any = None
    result: Future = field(default_factory=Future)
    arrived: float = 0.0


class Batches:
    """A queue of requests, and the function that answers those of one kind together.

    `work(kind, items)` gives a result for each item. A request that fails in company is repeated alone, so that it
    affects no other.
    """

    def __init__(
        self, work: Callable[[Any, Sequence[Any]], Sequence[Any]], *, batch: int, wait: float, most_waiting: int
    ) -> None:
        """`batch` is the most items that go together, `wait` the seconds for which the first waits for others."""
        self.work, self.batch, self.wait, self.most_waiting = work, batch, wait, most_waiting
        self._tickets: set[Ticket] = set()
        self._jobs: deque[Ticket] = deque()
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Number of requests that the model has not begun."""
        return len(self._tickets)

    def enter(self) -> Ticket:
        """Take a place for a request. Raises BusyError if there is none."""
        with self._changed:
            if len(self._tickets) >= self.most_waiting:
                raise BusyError
            ticket = Ticket()
            self._tickets.add(ticket)
            return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give a place back, of a request that came to nothing; later calls change nothing."""
        with self._changed:
            self._tickets.discard(ticket)
            ticket.result.cancel()

    def submit(self, ticket: Ticket, kind: Hashable, item: Any) -> Future:
        """Queue the work of a request; the result is that of its item."""
        with self._changed:
            ticket.kind, ticket.item, ticket.arrived = kind, item, time.monotonic()
            self._jobs.append(ticket)
            self._changed.notify()
        return ticket.result

    def run(self) -> None:
        """Answer requests for ever: the body of the model's thread."""
        while True:
            self._answer(self._next())

    def _next(self) -> list[Ticket]:
        """Wait for the next batch: the oldest request, and others of its kind."""
        with self._changed:
            while not self._jobs:
                self._changed.wait()
            first = self._jobs[0]
            while (left := first.arrived + self.wait - time.monotonic()) > 0 and len(self._of(first)) < self.batch:
                self._changed.wait(left)
            chosen = self._of(first)
            together = set(chosen)
            self._jobs = deque(job for job in self._jobs if job not in together)
            self._tickets -= together
            return [job for job in chosen if job.result.set_running_or_notify_cancel()]

    def _of(self, first: Ticket) -> list[Ticket]:
        return [job for job in self._jobs if job.kind == first.kind][: self.batch]

    def _answer(self, jobs: list[Ticket]) -> None:
        if not jobs:
            return
        try:
            results = self.work(jobs[0].kind, [job.item for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].result.set_exception(error)
                return
            for job in jobs:
                self._answer([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.result.set_result(result)
