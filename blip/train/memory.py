"""What the C library does with freed memory (glibc on Linux; nothing elsewhere)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from blip import dist


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the next step; returns whether it listened (glibc on Linux).

    Without it a step on CPU spends 15 to 20% of its time on pages that it gave back and asks for again. Large blocks
    are the ones that cost, and glibc lets no threshold above 32 MiB keep them, so it is told to map none at all.
    """
    trim_threshold, mmap_max = -1, -4
    mallopt = _from_the_c_library("mallopt")
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def give_back_freed_memory() -> bool:
    """Give freed memory back once in a while; returns whether there was some (glibc on Linux).

    Blocks of ever other sizes, as of texts of other lengths, leave holes between those in use: kept for good, they add
    up to several times what a step needs.
    """
    trim = _from_the_c_library("malloc_trim")
    return bool(trim and trim(0))


def _from_the_c_library(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux" or not dist.on_cpu():
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
