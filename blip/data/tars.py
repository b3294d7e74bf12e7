"""Tar shards by index: the headers are read once, the members never extracted, and only regular files looked at."""

from __future__ import annotations

import os
import tarfile
from array import array
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from blip.data.errors import DataError

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
CAPTIONS = ("txt", "caption", "json")
"""Endings that hold a caption, the first that a sample has wins."""


class Member(NamedTuple):
    """Where the bytes of a member are in its shard; size -1 says that there is none."""

    offset: int
    size: int


_NONE = Member(0, -1)


class Shard:
    """The samples of one tar file: members that share a name up to the first dot, wherever in the file they are."""

    def __init__(self, path: Path, *, allow_truncated: bool = False):
        """Read all headers. Raises DataError for what is no tar, is compressed, cut off, or has links or odd names."""
        self.path = path
        self.names: list[str] = []
        self._spans = array("q")  # image offset, size, caption offset, size
        self._json = bytearray()
        self._read_headers(allow_truncated)

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

    def _read_headers(self, allow_truncated: bool) -> None:
        samples: dict[str, dict[str, Member]] = {}
        error = None
        try:
            with tarfile.open(self.path, "r:") as tar:
                size = self.path.stat().st_size
                while (member := tar.next()) is not None:
                    if member.size < 0:  # would lead back to a header that has been read, for ever
                        raise tarfile.ReadError("a member of negative size")
                    if member.isreg() and member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    self._collect(member, samples)
                    tar.members = []  # or tarfile keeps every header in memory
                if not _has_end(self.path, tar.offset):
                    error = "the end marker is missing"
        except (tarfile.TarError, ValueError, OverflowError) as e:  # the last two of sizes that cannot be
            error = str(e) or type(e).__name__
        except OSError as e:
            raise DataError(f"{self.path} cannot be read: {e.strerror}") from None
        if error and (not samples or not allow_truncated):
            raise DataError(
                f"{self.path} is not a whole tar file ({error}) after {len(samples)} samples: copy it again, "
                "unpack it if it is compressed, or set allow_truncated to use the readable part"
            )
        for name, members in samples.items():
            self._add(name, members)

    def _collect(self, member: tarfile.TarInfo, samples: dict[str, dict[str, Member]]) -> None:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{self.path}: member {member.name!r} points outside the archive; such a file is not used")
        if member.isdir():
            return
        if not member.isreg():
            raise DataError(f"{self.path}: member {member.name!r} is a link or device; only files are read")
        stem, _, ending = path.name.partition(".")
        samples.setdefault(str(path.parent / stem), {})[ending.lower()] = Member(member.offset_data, member.size)

    def _add(self, name: str, members: dict[str, Member]) -> None:
        image = next((m for ending, m in members.items() if ending in IMAGES), _NONE)
        ending = next((e for e in CAPTIONS if e in members), "")
        caption = members.get(ending, _NONE)
        if image is _NONE and caption is _NONE:
            return
        self.names.append(name)
        self._spans.extend((*image, *caption))
        self._json.append(ending == "json")


def _has_end(path: Path, offset: int) -> bool:
    """Whether there are zeros where the header after the last member would be."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not block.strip(b"\0")


def read_member(shard: Path, member: Member) -> bytes:
    """The bytes of a member."""
    fd = os.open(shard, os.O_RDONLY)
    try:
        return os.pread(fd, member.size, member.offset)
    finally:
        os.close(fd)
