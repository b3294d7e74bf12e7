"""Reading ahead of a model: threads decode the next batch while it works on one."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    items: Iterable[Item], batch: int, read: Callable[[Item], Result], threads: int = 4
) -> Iterator[list[Result]]:
    """Yield the results of `read` on items, in order, `batch` at a time; threads read at most one batch ahead.

    An error of `read` is raised when its batch is requested.
    """
    pool = ThreadPoolExecutor(threads, "decode")
    coming: deque[Future[Result]] = deque()
    waiting = iter(items)

    def order(count: int) -> None:
        coming.extend(pool.submit(read, item) for item in itertools.islice(waiting, count))

    try:
        order(batch + threads)
        while coming:
            done = [coming.popleft().result() for _ in range(min(batch, len(coming)))]
            order(len(done))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)
