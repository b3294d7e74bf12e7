"""Tar shards by index: the headers are read once, the members never extracted, and only regular files looked at."""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from blip.data.errors import DataError

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
TEXTS = frozenset({"txt", "caption"})
TEXT_COLUMN = "caption"
"""The column that a text member stands for; others are of the JSON member."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """Where the bytes of a member are in its shard; size -1 says that there is none."""

    offset: int
    size: int


_NONE = Member(0, -1)


@dataclass(slots=True)
class Sample:
    """The members of one key: the name up to the ending, a second sample of the same name being KEY#2."""

    key: str
    image: Member = _NONE
    text: Member = _NONE
    """Of txt or caption."""
    json: Member = _NONE

    def caption(self, column: str) -> Member:
        """Where a caption is looked for: the text, or the JSON where there is none or another column is asked for."""
        return self.json if self.text is _NONE or column != TEXT_COLUMN else self.text

    @property
    def owner(self) -> str:
        """The key up to the first dot: what this may belong to, if it is not a sample by itself."""
        name = PurePosixPath(self.key)
        return str(name.parent / name.name.split(".")[0])


@dataclass(frozen=True)
class Headers:
    """What the headers of a shard say."""

    samples: list[Sample]
    """In the order of their first member, wherever in the file the others are."""
    twice: list[str]
    """Keys that occur more than once."""
    damage: str | None
    """What is wrong with the file; the samples are then those before that."""


def read_headers(file: IO[bytes], path: str | Path) -> Headers:
    """Read all headers of an open shard; `path` names it in errors.

    DataError for what may not be used at all: compressed files, links, devices, names that lead outside.
    """
    start, size = file.read(8), file.seek(0, os.SEEK_END)
    file.seek(0)
    if start.startswith(_COMPRESSED):
        raise DataError(f"{path} is compressed, which leaves no way to a single sample: unpack it to a plain .tar")
    if size == 0:
        return Headers([], [], "the file is empty (0 bytes)")
    found, damage = _Grouped(), None
    try:
        for member in _members(file, size):
            _check(member, path)
            found.add(member)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two of sizes that cannot be
        damage = str(error) or type(error).__name__
    return Headers(found.samples, [key for key, n in found.copies.items() if n > 1], damage)


def _members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """All members but folders. Raises tarfile.ReadError where the file is damaged."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if member.size < 0:  # would lead back to a header that has been read, for ever
                raise tarfile.ReadError(f"member {member.name!r} has a negative size")
            if member.isreg() and member.offset_data + member.size > size:
                raise tarfile.ReadError("the file is cut off")
            if not member.isdir():
                yield member
            tar.members = []  # or tarfile keeps every header in memory
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            raise tarfile.ReadError("the end marker is missing")


def _check(member: tarfile.TarInfo, path: str | Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{path}: member {member.name!r} points outside the archive; such a file is not used")
    if not member.isreg() or member.issparse():
        raise DataError(f"{path}: member {member.name!r} is a link or device; only plain files are read")


class _Grouped:
    """Samples by key. The ending is what follows the last dot, as names of pictures have dots of their own."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.copies: dict[str, int] = {}
        self._latest: dict[str, Sample] = {}

    def add(self, member: tarfile.TarInfo) -> None:
        name = PurePosixPath(member.name)
        stem, dot, ending = name.name.rpartition(".")
        ending = ending.lower()
        slot = "image" if ending in IMAGES else "text" if ending in TEXTS else "json" if ending == "json" else None
        if not dot or slot is None:
            return
        key = str(name.parent / stem).encode("utf-8", "backslashreplace").decode()
        sample = self._latest.get(key)
        if sample is None or getattr(sample, slot) is not _NONE:
            sample = self._start(key)
        setattr(sample, slot, Member(member.offset_data, member.size))

    def _start(self, key: str) -> Sample:
        copy = self.copies[key] = self.copies.get(key, 0) + 1
        sample = self._latest[key] = Sample(key if copy == 1 else f"{key}#{copy}")
        self.samples.append(sample)
        return sample


class Shard:
    """The samples of one tar file that training can use: a picture with a caption, or what lacks one of them.

    A half sample beside a whole one (`7.seg.png` beside `7.jpg` and `7.txt`) is something else about that: left out.
    """

    def __init__(self, path: Path, column: str = TEXT_COLUMN, *, allow_truncated: bool = False):
        """Read all headers; captions are of `column`.

        Raises DataError for what is no tar, is compressed, cut off, or has links or odd names.
        """
        self.path = path
        self.names: list[str] = []
        self._spans = array("q")  # image offset, size, caption offset, size
        self._json = bytearray()
        try:
            with path.open("rb") as file:
                found = read_headers(file, path)
        except OSError as e:
            raise DataError(f"{self.path} cannot be read: {e.strerror}") from None
        if found.damage and (not found.samples or not allow_truncated):
            raise DataError(
                f"{self.path} is not a whole tar file ({found.damage}) after {len(found.samples)} samples: "
                "copy it again, or set allow_truncated to use the readable part"
            )
        whole = {sample.key for sample in found.samples if _NONE not in (sample.image, sample.caption(column))}
        for sample in found.samples:
            if sample.key in whole or sample.owner not in whole:
                caption = sample.caption(column)
                self.names.append(sample.key)
                self._spans.extend((*sample.image, *caption))
                self._json.append(caption is not sample.text)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> Member:
        return Member(self._spans[4 * i], self._spans[4 * i + 1])

    def caption(self, i: int) -> tuple[Member, bool]:
        """Where the caption is, and whether it is in a JSON member."""
        return Member(self._spans[4 * i + 2], self._spans[4 * i + 3]), bool(self._json[i])

    def spans(self) -> np.ndarray:
        """(samples, 4) int64: image offset and size, caption offset and size."""
        return np.array(self._spans, dtype=np.int64).reshape(-1, 4)

    def is_json(self) -> np.ndarray:
        """(samples,) bool: whether the caption is in a JSON member."""
        return np.array(self._json, dtype=bool)


def read_member(shard: Path, member: Member) -> bytes:
    """The bytes of a member."""
    fd = os.open(shard, os.O_RDONLY)
    try:
        return os.pread(fd, member.size, member.offset)
    finally:
        os.close(fd)
