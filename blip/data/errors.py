"""What can go wrong with data: a bad sample is replaced and counted, everything else stops the run."""

from __future__ import annotations

from collections.abc import Sequence

from blip.errors import Stopped

_SHOWN = 5
"""Things that an error names."""


class BadSample(Exception):
    """One sample cannot be used; it is replaced by another and written to the ledger."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class DataError(Stopped):
    """The data, or the processes that read it, cannot be used as they are."""


class TooManyBad(DataError):
    """More samples are unreadable than `DataConfig.max_bad_fraction` allows."""


def counted(names: Sequence[object], unit: str) -> str:
    """`8 images (12, 15, 18, 21, 24, ...)`: how many there are, the first few by name."""
    some = ", ".join(map(str, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)
    return f"{len(names)} {unit}{'s' * (len(names) > 1)} ({some})"
