"""What a sub-command says: answers on standard output or into a file as they are made, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from tqdm import tqdm

from blip.commands.pictures import not_pictures
from blip.log import clock

if TYPE_CHECKING:
    from blip.commands.pictures import Picture

_FEW = 5
"""So many pictures are answered without talk of progress."""
_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


class Answers:
    """A context in which lines are given out, flushed one by one, and progress is told.

    `path` None is standard output. OSError, naming the file, when it cannot be written.
    """

    def __init__(self, path: str | None, total: int, unit: str = "pictures") -> None:
        self.path, self.total, self.unit = path, total, unit
        self.done = self.failed = 0
        self._out: TextIO = sys.stdout
        self._told = total > _FEW
        self._started, self._said = time.monotonic(), float("-inf")

    def __enter__(self) -> Self:
        # A file name may be any bytes and a caption any text, whatever the terminal's encoding.
        if self.path is None:
            self._out.reconfigure(encoding="utf-8", errors="surrogateescape")
        else:
            self._out = open(self.path, "w", encoding="utf-8", errors="surrogateescape")
        bar = self._told and sys.stderr.isatty()
        self._bar = tqdm(total=self.total, unit=f" {self.unit}", file=sys.stderr, dynamic_ncols=True, disable=not bar)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()
        if self.path is not None:
            with contextlib.suppress(OSError):  # every line has been flushed, or its error is on its way
                self._out.close()
        if isinstance(error, KeyboardInterrupt):
            self._say(f"stopped after {self.done} of {self.total} {self.unit}")
        elif self.failed and error is None:
            self._say(f"{self.failed} of {self.total} {self.unit} could not be used")

    def text(self, name: str, *fields: str) -> None:
        """One line of fields with tabs between them, the first a file's name."""
        self._give("\t".join((shown(name), *fields)))

    def json(self, values: dict[str, Any]) -> None:
        """One line of JSON."""
        self._give(json.dumps(values))

    def _give(self, line: str) -> None:
        try:
            tqdm.write(line, file=self._out)
            self._out.flush()
        except OSError as error:
            if self.path is None:
                raise
            written = f"{self.path} could not be written on after {self.done} {self.unit}: {error.strerror}"
            raise OSError(written) from None

    def left_out(self, endings: Counter[str]) -> None:
        """Tell of files in folders that were not taken for pictures, if there are any."""
        if said := not_pictures(endings):
            self._say(said)

    def failure(self, name: str, reason: str) -> None:
        """One line on stderr about what could not be used."""
        self.failed += 1
        self._say(f"{shown(name)}: {reason}")

    def readable(self, pictures: Iterable[Picture]) -> list[Picture]:
        """Those that could be read; a failure is told of each other."""
        read = []
        for picture in pictures:
            if picture.reason:
                self.failure(picture.path, picture.reason)
            else:
                read.append(picture)
        return read

    def advance(self, count: int) -> None:
        """So many more are done, failed ones included."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._told and self._bar.disable and (now - self._said >= _SECONDS or self.done == self.total):
            rate = self.done / max(now - self._started, 1e-9)
            left = clock((self.total - self.done) / rate)
            self._say(f"{self.done}/{self.total} {self.unit}  {rate:.1f} a second  {left} left")
            self._said = now

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def shown(name: str) -> str:
    """A file's name as one line: control characters, which could end a line or command a terminal, are escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found.group())[1:-1], name)
