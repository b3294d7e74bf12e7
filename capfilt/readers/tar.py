"""Tar shards: an index of where members are, made once from the headers; rows are then read in any order.

No member is extracted, unpickled or followed; a shard with links, devices or names that lead outside is refused whole.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from blip.data.errors import DataError
from blip.data.images import MAX_BYTES
from blip.data.tars import IMAGES
from capfilt.readers.rows import Row, RowGroups, Source, extra_of, open_file, plain, read_range, texts_of
from capfilt.settings import ReadConfig
from capfilt.storage import Storage

_TEXTS = ("txt", "caption")
_KNOWN = frozenset({*IMAGES, *_TEXTS, "json"})
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_SPAN = pa.struct([("at", pa.int64()), ("size", pa.int64())])
INDEX = pa.schema([("key", pa.string()), ("image", _SPAN), ("text", _SPAN), ("json", _SPAN)])


class _Index:
    """Samples by key in the order of their first member, wherever in the file the other members are."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.samples: list[dict[str, Any]] = []
        self._latest: dict[str, dict[str, Any]] = {}
        self._copies: dict[str, int] = {}

    def add(self, member: tarfile.TarInfo) -> None:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{self.path}: member {member.name!r} points outside the archive; such a file is not used")
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            raise DataError(f"{self.path}: member {member.name!r} is a link or device; only plain files are read")
        stem, dot, ending = name.name.rpartition(".")
        if not dot or ending.lower() not in _KNOWN:
            return
        ending = ending.lower()
        slot = "image" if ending in IMAGES else "text" if ending in _TEXTS else "json"
        key = str(name.parent / stem).encode("utf-8", "backslashreplace").decode()
        sample = self._latest.get(key)
        if sample is None or slot in sample:
            sample = self._start(key)
        sample[slot] = {"at": member.offset_data, "size": member.size}

    def _start(self, key: str) -> dict[str, Any]:
        copy = self._copies[key] = self._copies.get(key, 0) + 1
        sample = {"key": key if copy == 1 else f"{key}#{copy}"}
        self._latest[key] = sample
        self.samples.append(sample)
        return sample

    def notes(self) -> list[str]:
        twice = [key for key, n in self._copies.items() if n > 1]
        return [f"{len(twice)} keys occur more than once, e.g. {twice[0]!r}; the later ones are called KEY#2 and so on"
                ] if twice else []  # fmt: skip


def index(path: str) -> tuple[pa.Table, str | None, list[str]]:
    """Read all headers of a shard -> (samples, damage or None, notes).

    What comes before a tear is indexed and the damage said. DataError for what may not be used at all.
    """
    found, damage = _Index(path), None
    with open_file(path) as file:
        start = file.read(8)
        size = file.seek(0, 2)
        file.seek(0)
        if start.startswith(_COMPRESSED):
            raise DataError(f"{path} is compressed, which leaves no way to a single sample: unpack it to a plain .tar")
        if size == 0:
            return pa.Table.from_pylist([], INDEX), "the file is empty (0 bytes)", []
        try:
            _read_headers(file, size, found)
        except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two of sizes that cannot be
            damage = str(error) or type(error).__name__
    if damage:
        damage = f"{damage}; readable are {len(found.samples)} samples"
    rows = [s for s in found.samples if len(s) > 1]
    return pa.Table.from_pylist(rows, INDEX), damage, found.notes()


def _read_headers(file: IO[bytes], size: int, found: _Index) -> None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if member.size < 0:  # would lead back to a header that has been read, for ever
                raise tarfile.ReadError(f"member {member.name!r} has a negative size")
            if member.isreg() and member.offset_data + member.size > size:
                raise tarfile.ReadError("the file is cut off")
            found.add(member)
            tar.members = []  # or tarfile keeps every header in memory
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            raise tarfile.ReadError("the end marker is missing")


class TarReader:
    """Rows of a shard by its index."""

    def __init__(self, source: Source, config: ReadConfig, storage: Storage) -> None:
        from capfilt.plan import open_index

        self.path, self.column = source.path, config.caption_column
        self.index: RowGroups = open_index(storage, source)

    def read(self, lo: int, hi: int) -> Iterator[Row]:
        for number, entry in zip(range(lo, hi), self.index.rows(lo, hi), strict=True):
            row = Row(number, entry["key"])
            try:
                self._fill(row, entry)
            except OSError as error:
                row.problem = ("source_error", "unreadable", error.strerror or str(error))
            yield row

    def _fill(self, row: Row, entry: dict[str, Any]) -> None:
        if entry["json"]:
            row.extra = _json(self._bytes(entry["json"]))
        if entry["text"]:
            row.texts = [self._bytes(entry["text"]).decode("utf-8", "replace")]
        else:
            row.texts = texts_of(row.extra.get(self.column))
        row.extra = extra_of(row.extra, *(() if entry["text"] else (self.column,)))
        if entry["image"] is None:
            row.problem = ("no_image", "no_image", "no image member")
        elif entry["image"]["size"] > MAX_BYTES:
            row.problem = ("too_large", "too_many_bytes", f"{entry['image']['size']:,} bytes")
        else:
            row.image = self._bytes(entry["image"])

    def _bytes(self, span: dict[str, int]) -> bytes:
        return read_range(self.path, span["at"], min(span["size"], MAX_BYTES))


def _json(content: bytes) -> dict[str, Any]:
    """The object of a .json member; a member that is none stands under "json" as it is."""
    text = content.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"json": plain(text)}
    return value if isinstance(value, dict) else {"json": value}
