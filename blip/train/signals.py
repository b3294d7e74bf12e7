"""Requests to stop: signals, and a launcher that has died. Only flags are set; the loop acts between two steps."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from blip.processes import command_of

logger = logging.getLogger(__name__)

STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
"""Signals that request a stop; Windows has no SIGUSR1."""


class Stopper:
    """Sets `stop_requested` on SIGTERM, SIGUSR1, SIGINT and on the death of torchrun or accelerate launch.

    A second SIGINT, some seconds after the first, interrupts at once.
    """

    def __init__(self) -> None:
        self._stop_requested = False
        self._interrupted = 0.0
        self._parent = os.getppid() if _is_launcher(os.getppid()) else None

    def __enter__(self) -> Stopper:
        here = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._handle) for number in STOP} if here else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            # A launcher forwards an interrupt that the terminal has already sent to every process.
            if self._interrupted and now - self._interrupted > 3:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self._stop_requested = True

    @property
    def stop_requested(self) -> bool:
        """Whether to save and stop after this step."""
        if self._parent is not None and os.getppid() != self._parent:
            logger.warning("the launcher (process %d) is gone: stopping", self._parent)
            self._parent, self._stop_requested = None, True
        return self._stop_requested


def _is_launcher(pid: int) -> bool:
    """Whether a process is torchrun or accelerate; any other parent, such as a shell, may end before its child."""
    words = command_of(pid)
    return any(Path(word).name in ("torchrun", "accelerate") or "torch.distributed" in word for word in words) or any(
        word.startswith("accelerate.commands") for word in words
    )
