"""Output of sub-commands: answers to standard output or a file as they are made, progress to stderr.

An unfinished file of answers is continued image by image, and only a file of the same command with the same options is
ever continued or replaced; `FILE.options.json` beside it records the options.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from tqdm import tqdm

from blip import files
from blip.data.formats.tars import IMAGES
from blip.data.image_files import not_images
from blip.progress import clock

if TYPE_CHECKING:
    from blip.data.image_files import ImageFile, InputImages

_FEW = 5
"""Largest number of images processed without progress lines."""
_SECONDS = 10.0
"""Seconds between two lines of progress if stderr is not a terminal."""


_SYNC_SECONDS = 5.0
"""Seconds between two syncs of a file of answers, against power cuts; a killed process loses nothing without them."""
_OPTIONS = ".options.json"
_FORMAT = "openblip answers"
_MARKS = (b'<meta name="generator" content="openblip">', b"tEXtSoftware\0openblip", b"openblip explain")
"""Marks that identify a page, a PNG and a JPEG written by this program."""


@dataclass(frozen=True)
class Form:
    """Layout of a command's lines of answers, and the options that they depend on."""

    command: str
    as_json: bool
    keys: tuple[str, ...]
    """Keys of a JSON line; the first names the subject of the answer."""
    fields: str
    """Types of the fields of a text line, the first being the subject: t for text, n for a number."""
    options: dict[str, Any] = field(default_factory=dict)
    lines: int = 1
    """Largest number of text lines for one image."""
    other_keys: tuple[str, ...] = ()
    """Keys of JSON lines about another kind of subject."""

    def named(self, name: str) -> str:
        """Name of a subject as it stands in the file."""
        return name if self.as_json else shown(name)

    def key(self, line: bytes) -> str | None:
        """Subject of a complete line; None if the line is not an answer of this command."""
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line):
            return None
        text = line.decode("utf-8", "surrogateescape")
        if self.as_json:
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                return None
            if not isinstance(values, dict) or not values or tuple(values) not in (self.keys, self.other_keys):
                return None
            subject = next(iter(values.values()))
            return subject if isinstance(subject, str) else None
        values = text.split("\t")
        ours = len(values) == len(self.fields) and all(map(_is, values, self.fields))
        return values[0] if ours else None

    def begins(self, torn: bytes, names: Sequence[str]) -> bool:
        """Whether an incomplete line can be the beginning of an answer about one of `names`."""
        text = torn.decode("utf-8", "surrogateescape")
        if self.as_json:
            start = f'{{"{self.keys[0]}": "'
            return start.startswith(text) or text.startswith(start)
        about, tab, _ = text.partition("\t")
        return any(name == about if tab else name.startswith(about) for name in map(shown, names))

    def record(self) -> dict[str, Any]:
        """The form and its options as recorded beside the answers."""
        form = "JSON lines" if self.as_json else "text"
        values = {"format": _FORMAT, "version": 1, "command": self.command, "form": form, **self.options}
        return json.loads(json.dumps(values))


def _is(value: str, kind: str) -> bool:
    return kind == "t" or re.fullmatch(r"-|-?\d+\.\d+|nan|-?inf", value) is not None


class Answers:
    """Context that prints results line by line, flushing each, and reports progress.

    `path` None is standard output. With `form` a file is continued: see `to_do`. With `whole` all lines are written
    at once, at the end. OSError, naming the file, if it cannot be written; ValueError if it holds anything but answers
    of this form with these options.
    """

    def __init__(
        self,
        path: str | None,
        about: InputImages | Sequence[str] | int,
        unit: str = "images",
        form: Form | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.path, self.unit, self.form, self.whole = path, unit, form, whole
        self._about = about
        self.names: Sequence[str] = [] if isinstance(about, int) else getattr(about, "paths", about)
        self.total = about if isinstance(about, int) else getattr(about, "total", len(self.names))
        self.done = self.failed = 0
        self.to_do: list[str] = list(self.names)
        """Names without an answer in the file so far."""
        self.closing = self.remedy = ""
        """Last line in place of the number of failures, and what to do after an interruption."""
        self._out: TextIO = sys.stdout
        self._lines: list[str] = []
        self._reports = self.total > _FEW
        self._started, self._last_report = time.monotonic(), float("-inf")
        self._synced = self._started

    def __enter__(self) -> Self:
        # A file name may be any bytes and a caption any text, whatever the terminal's encoding.
        if self.path is None:
            self._out.reconfigure(encoding="utf-8", errors="surrogateescape")
        else:
            self._open(self.path)
        before = len(self.names) - len(self.to_do)
        self.total -= before
        self._reports = self.total > _FEW
        bar = self._reports and sys.stderr.isatty()
        self._bar = tqdm(total=self.total, unit=f" {self.unit}", file=sys.stderr, dynamic_ncols=True, disable=not bar)
        if before and not self.to_do:
            self._say(f"{self.path} already has the answers about all {before} {self.unit}: nothing to do")
        elif before:
            self._say(f"{self.path} already has the answers about {before} {self.unit}: {self.total} left")
        if not isinstance(self._about, int) and hasattr(self._about, "walk"):
            self._report(self._about)
        return self

    def _open(self, path: str) -> None:
        ways = {"encoding": "utf-8", "errors": "surrogateescape"}
        refuse_out(path)
        if self.form is None or (os.path.lexists(path) and os.path.exists(path) and not os.path.isfile(path)):
            self.whole = False
            self._out = Path(path).open("w", **ways)  # a pipe or a device  # noqa: SIM115
            return
        size, about = _resumable(path, self.form, self.names)
        record = json.dumps(self.form.record(), indent=1).encode() + b"\n"
        if self.whole:
            files.replace_file(Path(path + _OPTIONS), record)
            return
        answered = set(about)
        self.to_do = [name for name in self.names if self.form.named(name) not in answered]
        self._out = Path(path).open("a", **ways)  # noqa: SIM115
        if os.path.getsize(path) > size:
            os.truncate(path, size)
        if not size:
            files.replace_file(Path(path + _OPTIONS), record)

    def _report(self, images: InputImages) -> None:
        for line in (not_images(images.left_out), *map(shown, images.walk.notes)):
            if line:
                self._say(line)
        for path, reason in images.walk.unreadable:
            self.failure(path, reason)
        if images.walk.unreadable:
            self.advance(len(images.walk.unreadable))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()
        if self.path is not None and self.whole:
            if error is None:
                content = "".join(line + "\n" for line in self._lines)
                files.replace_file(Path(self.path), content.encode("utf-8", "surrogateescape"))
        elif self.path is not None:
            self._sync(0.0)
            with contextlib.suppress(OSError):  # every line has been flushed, or its error is being raised
                self._out.close()
        if isinstance(error, KeyboardInterrupt):
            self._say(f"stopped after {self.done} of {self.total} {self.unit}{self.remedy}")
        elif error is None and self.closing:
            self._say(self.closing)
        elif self.failed and error is None:
            self._say(f"{self.failed} of {self.total} {self.unit} could not be used")

    def _sync(self, seconds: float) -> None:
        if self.path is not None and not self.whole and time.monotonic() - self._synced >= seconds:
            with contextlib.suppress(OSError):  # a pipe or a device cannot be synced
                os.fsync(self._out.fileno())
            self._synced = time.monotonic()

    def text(self, name: str, *fields: str) -> None:
        """Write one line of tab-separated fields, the first a file's name."""
        self._give("\t".join((shown(name), *fields)))

    def json(self, values: dict[str, Any]) -> None:
        """Write one line of JSON."""
        self._give(json.dumps(values))

    def _give(self, line: str) -> None:
        if self.path is not None and self.whole:
            self._lines.append(line)
            return
        try:
            tqdm.write(line, file=self._out)
            self._out.flush()
        except OSError as error:
            if self.path is None:
                raise
            written = f"{self.path} could not be written after {self.done} {self.unit}: {error.strerror}"
            raise OSError(written) from None

    def failure(self, name: str, reason: str) -> None:
        """Count a failure, and print its reason as one line on stderr."""
        self.failed += 1
        self._say(f"{shown(name)}: {reason}")

    def readable(self, files: Iterable[ImageFile]) -> list[ImageFile]:
        """Return the files that could be read; report the others as failures."""
        read = []
        for image in files:
            if image.reason:
                self.failure(image.path, image.reason)
            else:
                read.append(image)
        return read

    def advance(self, count: int) -> None:
        """Count `count` more as done, including failed ones."""
        self.done += count
        self._bar.update(count)
        self._sync(_SYNC_SECONDS)
        now = time.monotonic()
        if self._reports and self._bar.disable and (now - self._last_report >= _SECONDS or self.done == self.total):
            rate = self.done / max(now - self._started, 1e-9)
            left = clock((self.total - self.done) / rate)
            self._say(f"{self.done}/{self.total} {self.unit}  {rate:.1f} a second  {left} left")
            self._last_report = now

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def refuse_out(path: str | None) -> None:
    """Raise ValueError if `path` is a folder or named like an image, as when a shell expands `--out *.jpg`."""
    if path is None:
        return
    if os.path.isdir(path):
        raise ValueError(f"--out {path!r} is a folder; give the name of a file")
    if os.path.splitext(path)[1].lower()[1:] in IMAGES:
        raise ValueError(
            f"--out {path} is named like an image, but answers are text: give a name such as answers.txt "
            "(a glob after --out expands to images)"
        )


def refuse_page(option: str, path: str) -> None:
    """Raise ValueError if a page or strip would overwrite a file that this program did not write."""
    if os.path.isdir(path):
        raise ValueError(f"{option} {path} is a folder; give the name of a file")
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    with open(path, "rb") as file:
        head = file.read(4096)
    if not any(mark in head for mark in _MARKS):
        raise ValueError(
            f"{option} {path} exists and was not written by this program, so it is not overwritten: give another name, "
            "or move the file"
        )


def _resumable(path: str, form: Form, names: Sequence[str]) -> tuple[int, list[str]]:
    """Number of bytes of a file that are complete answers, and their subjects; an incomplete answer is repeated."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        content = b""
    record = _recorded(Path(path + _OPTIONS))
    another = "give another --out, or delete it to start over"
    *lines, torn = content.split(b"\n")
    torn = torn.rstrip(b"\0")  # left by a power cut before the line was on disk
    keys = [form.key(line) for line in lines]
    if not torn and keys and keys[-1] is None:
        torn = lines[-1]
        keys.pop(), lines.pop()
    foreign = next((number for number, key in enumerate(keys, 1) if key is None), None)
    if foreign is None and torn and form.key(torn) is None and not form.begins(torn, names):
        foreign = len(keys) + 1
    if foreign is not None:
        raise ValueError(
            f"line {foreign} of {path} is not an answer of `blip {form.command}` with these options, so the file is "
            "not overwritten: give another --out"
        )
    if content and record is None:
        raise ValueError(f"{path}{_OPTIONS}, the record of how the answers in {path} were made, is missing: {another}")
    if content and record is not None:
        # The model's folder may have moved; its weights are compared instead.
        there, now = ({k: v for k, v in record_of.items() if k != "model"} for record_of in (record, form.record()))
        other = [f"{k} {there.get(k)!r} then, {now.get(k)!r} now" for k in there | now if there.get(k) != now.get(k)]
        if other:
            raise ValueError(f"{path} holds answers made with other options ({'; '.join(other)}): {another}")
    if not form.as_json and keys and 0 < (count := _last_group(keys)) < form.lines:
        keys, lines = keys[:-count], lines[:-count]
    return sum(len(line) + 1 for line in lines), keys


def _last_group(keys: Sequence[str]) -> int:
    """Number of lines at the end with the same subject."""
    return next((n for n, key in enumerate(reversed(keys)) if key != keys[-1]), len(keys))


def _recorded(path: Path) -> dict[str, Any] | None:
    """Read the options recorded beside answers. ValueError for a file that is not such a record."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"{path} exists and is not a record of options, so it is not overwritten: give another --out")
    return record


def shown(name: str) -> str:
    """Escape the control characters of a file's name, which could break a line or control a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match.group())[1:-1], name)
