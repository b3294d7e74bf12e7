"""Fault injection for tests: `CAPFILT_FAULT=point` or `point:3` kills the process there, the third time."""

from __future__ import annotations

import os
import signal
import time

_seen: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Kill this process without warning if `CAPFILT_FAULT` names this point and this pass through it."""
    wanted, _, count = os.environ.get("CAPFILT_FAULT", "").partition(":")
    if wanted != name:
        return
    _seen[name] = _seen.get(name, 0) + 1
    if _seen[name] >= int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def decode_fault(key: str) -> None:
    """Crash or hang like a decoder: `CAPFILT_FAULT=decode.abort@KEY` or `decode.hang@KEY`, for the row of that key."""
    wanted, _, which = os.environ.get("CAPFILT_FAULT", "").partition("@")
    if which != key:
        return
    if wanted == "decode.abort":
        os.abort()
    if wanted == "decode.hang":
        time.sleep(3600)
