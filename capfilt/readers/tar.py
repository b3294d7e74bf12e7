"""Tar shards: an index of where members are, made once from the headers; rows are then read in any order.

No member is extracted, unpickled or followed; a shard with links, devices or names that lead outside is refused whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from blip.data.formats.tars import TEXT_COLUMN, Member, read_headers
from blip.data.images import MAX_BYTES
from capfilt.readers.rows import (
    Row,
    RowGroups,
    Source,
    choose_column,
    extra_of,
    open_file,
    plain,
    read_range,
    texts_of,
)
from capfilt.settings import NO_COLUMN, ReadConfig
from capfilt.store.storage import Storage

_SPAN = pa.struct([("at", pa.int64()), ("size", pa.int64())])
_PROBES = 64
"""Samples whose columns are looked at when a plan is made."""
INDEX = pa.schema([("key", pa.string()), ("image", _SPAN), ("text", _SPAN), ("json", _SPAN)])


def index(path: str) -> tuple[pa.Table, str | None, list[str]]:
    """Read all headers of a shard -> (samples, damage or None, notes).

    What comes before a tear is indexed and the damage said. DataError for what may not be used at all.
    """
    with open_file(path) as file:
        found = read_headers(file, path)
    slots = ("image", "text", "json")
    rows = [{"key": s.key} | {slot: _span(getattr(s, slot)) for slot in slots} for s in found.samples]
    damage = found.damage
    if damage and rows:
        damage = f"{damage}; readable are {len(rows)} samples"
    return pa.Table.from_pylist(rows, INDEX), damage, found.notes


def check_column(path: str, table: pa.Table, config: ReadConfig) -> None:
    """DataError if none of the first samples of an index has the column that captions are to be of.

    Pictures without any columns or texts are all right where no other column was asked for.
    """
    column, first = config.caption_column, table.slice(0, _PROBES).to_pylist()
    if column == NO_COLUMN or (column == TEXT_COLUMN and any(entry["text"] for entry in first)):
        return
    names: set[str] = set()
    for span in (entry["json"] for entry in first if entry["json"]):
        names |= _json(read_range(path, span["at"], min(span["size"], MAX_BYTES))).keys()
        if column in names:
            return
    if names or (first and column != TEXT_COLUMN):
        choose_column(list(names), config, "caption_column", (), f"{path}: of the first {len(first)} samples, none")


def _span(member: Member) -> dict[str, int] | None:
    return {"at": member.offset, "size": member.size} if member.size >= 0 else None


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
        if entry["text"] and self.column == TEXT_COLUMN:
            row.texts = [self._bytes(entry["text"]).decode("utf-8", "replace")]
            row.extra = extra_of(row.extra)
        else:  # of NO_COLUMN, which JSON could have, too, there are no texts
            row.texts = texts_of(row.extra.get(self.column)) if self.column != NO_COLUMN else []
            row.extra = extra_of(row.extra, self.column)
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
