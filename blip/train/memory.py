"""Control over what the C library does with freed memory (glibc on Linux; no effect elsewhere)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from blip import dist


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next step; return whether it does.

    Without this a step on CPU spends 15 to 20% of its time on pages that were returned and are requested again. Large
    blocks cost most, and glibc keeps none above a threshold of at most 32 MiB, so mapping blocks is turned off.
    """
    trim_threshold, mmap_max = -1, -4
    mallopt = _from_the_c_library("mallopt")
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def give_back_freed_memory() -> bool:
    """Return freed memory to the system; return whether there was any. Called once in a while.

    Blocks of varying sizes, as of texts of varying lengths, leave holes between those in use, which add up to several
    times what a step needs.
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
