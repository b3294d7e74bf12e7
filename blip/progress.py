"""Progress of long work on a terminal or in a log: a bar with rate and time left."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

from tqdm import tqdm


def bar(total: int, what: str, unit: str = "it", *, show: bool = True) -> tqdm:
    """A progress line on stderr with rate and time left, shown after the first second."""
    every = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        delay=1.0,
        leave=None,
        mininterval=every,
        maxinterval=max(10.0, every),
        file=LenientStream(sys.stderr),
        disable=not show,
    )


def clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class LenientStream:
    """A stream whose reader may be gone: failed writes are dropped, so that the run continues."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()
