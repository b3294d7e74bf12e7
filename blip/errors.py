"""Errors: a bad sample is replaced and counted, everything else ends the program with one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

DOCS = "https://openblip.readthedocs.io"
"""Address of the documentation, which an installed package does not hold; messages name its pages by their titles."""


class Stopped(RuntimeError):
    """A run ended; the message is complete: what happened, where, and what to do."""


_FULL = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""Messages of CUDA, PyTorch's allocator of main memory on Linux and on Windows, and cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine or a device is out of memory."""
    if isinstance(error, RuntimeError) and not isinstance(error, Stopped):
        return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _FULL)
    return isinstance(error, MemoryError)


_SHOWN = 5
"""Most items that an error lists."""
_QUOTED = 60
"""Most characters of a value that an error quotes."""
_LONGEST = 1000
"""Most characters of a reason; each bad sample's is kept in memory and written to the ledger."""


class BadSample(Exception):
    """A sample that cannot be used; it is replaced by another and written to the ledger.

    `code` is the cause for programs, `reason` for people.
    """

    def __init__(self, reason: str, code: str = "unreadable"):
        reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."
        super().__init__(reason)
        self.reason, self.code = reason, code

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.code)


class UnreadableImage(BadSample):
    """An image that cannot or must not be read or decoded."""

    def __init__(self, code: str, detail: str):
        super().__init__(detail, code)

    def __reduce__(self) -> tuple:
        return type(self), (self.code, self.reason)


class DataError(Stopped):
    """The data, or the processes that read it, cannot be used as they are."""


class StuckSample(DataError):
    """Decoding a sample took too much time."""

    def __init__(self, message: str, key: str, reason: str):
        super().__init__(message)
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple:
        return type(self), (*self.args, self.key, self.reason)


class TooManyBad(DataError):
    """More samples are unreadable than `DataConfig.max_bad_fraction` allows."""


def counted(names: Sequence[object], unit: str) -> str:
    """Count items and name the first few: `8 images (12, 15, 18, 21, 24, ...)`."""
    some = ", ".join(map(str, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)
    return f"{len(names)} {unit}{'s' * (len(names) > 1)} ({some})"


def shown(value: object) -> str:
    """Quote a value of the data in one line of bounded length; a cut value states its length."""
    if not isinstance(value, str | bytes):
        text = repr(value)
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
    unit = "characters" if isinstance(value, str) else "bytes"
    return repr(value) if len(value) <= _QUOTED else f"{value[:_QUOTED]!r}... ({len(value):,} {unit})"


_SECRETS = re.compile(r"""(?<=://)[^/\s"'?#@]*@|(?<=://)(?P<plain>[^\s"'?]*)\?(?:(?!::)[^\s"'])*""")
"""Users and passwords of addresses in a text, and their queries, which may be signatures."""


def without_credentials(text: str) -> str:
    """A text without the users, passwords and queries of the addresses in it."""
    if "://" not in text:
        return text
    while (cleaned := _SECRETS.sub(lambda match: match["plain"] or "", text)) != text:
        text = cleaned
    return text
