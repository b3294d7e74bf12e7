"""What can go wrong with data: a bad sample is replaced and counted, everything else stops the run."""

from __future__ import annotations

from blip.errors import Stopped


class BadSample(Exception):
    """One sample cannot be used; it is replaced by another and written to the ledger."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class DataError(Stopped):
    """The data, or the processes that read it, cannot be used as they are."""


class TooManyBad(DataError):
    """More samples are unreadable than `DataConfig.max_bad_fraction` allows."""
