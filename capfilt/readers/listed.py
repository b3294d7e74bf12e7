"""Lists of {image, caption}: JSON, JSON lines, image folders, and img2dataset's folders of files.

A list has no rows by number, so the plan keeps a copy of it as parquet, which has; the images stay where they are.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from blip.data.formats.json_rows import rows_or_faults
from blip.data.formats.parquet import values_of
from blip.data.formats.splits import of_split
from blip.data.formats.tars import IMAGES
from blip.data.formats.values import image_of
from blip.errors import BadSample, DataError
from capfilt.readers.parquet import columns_of, open_parquet
from capfilt.readers.rows import (
    Row,
    RowGroups,
    Source,
    choose_column,
    extra_of,
    plain,
    read_image,
    texts_of,
)
from capfilt.settings import ReadConfig
from capfilt.store.storage import Storage

INDEX = pa.schema(
    [("key", pa.string()), ("image", pa.string()), ("texts", pa.list_(pa.string())), ("extra", pa.string()),
     ("fault", pa.string())]
)  # fmt: skip
"""`fault` is why a row has no image; None in the indexes of older plans."""
_BLOCK = 1 << 16
_FIRST = 64
"""Rows that are looked at for the columns there are."""


def index_json(
    path: str, config: ReadConfig, seen: Counter[str] | None = None
) -> tuple[pa.Table, str | None, list[str]]:
    """The rows of a JSON list, JSON lines or a CSV file -> (rows, None, notes). DataError names file and row.

    Of the split asked for; `seen` counts the splits there are. A row that cannot be used is a row all the same, and has
    its `fault` in place of an image.
    """
    notes: list[str] = []
    seen = Counter() if seen is None else seen
    found = rows_or_faults(Path(path), lambda note: notes.append(note.removeprefix(f"{path}: ")))
    rows = of_split(found, config.split, Path(path), seen)
    first = list(itertools.islice(rows, _FIRST))
    names = {str(name): None for _, row in first if isinstance(row, dict) for name in row}
    if first and not names:
        number, fault = first[0]
        raise DataError(f"{path}: row {number} {fault.reason}, and no other of its first {len(first)} rows is better")
    image, caption = columns_of(list(names), config, path) if first else ("", None)
    blocks, block = [], []
    for number, row in itertools.chain(first, rows):
        if isinstance(row, dict):
            block.append(_entry(str(row.get("key", number)), row.get(image), row, image, caption))
        else:
            fault = f"the row {row.reason}"
            block.append({"key": str(number), "image": None, "texts": [], "extra": "{}", "fault": fault})
        if len(block) == _BLOCK:
            blocks.append(pa.Table.from_pylist(block, INDEX))
            block = []
    return pa.concat_tables([*blocks, pa.Table.from_pylist(block, INDEX)]), None, notes


def _entry(key: str, image: Any, row: dict[str, Any], *taken: str | None) -> dict[str, Any]:
    columns = [name for name in taken if name]
    name, fault = None, None
    try:
        name = str(image_of(image))
    except BadSample as error:
        fault = error.reason
    return {
        "key": plain(key),
        "image": name,
        "texts": texts_of(row.get(columns[1])) if len(columns) > 1 else [],
        "extra": plain(json.dumps(extra_of(row, *columns))),
        "fault": fault,
    }


def index_files(path: str, config: ReadConfig) -> tuple[pa.Table, str | None, list[str]]:
    """A shard of img2dataset's `files` output, given its parquet beside the folder -> (rows, damage, notes)."""
    folder = path.removesuffix(".parquet")
    present = {}
    for name in sorted(os.listdir(folder)):
        stem, _, ending = name.rpartition(".")
        if ending.lower() in IMAGES:
            present[stem] = f"{os.path.basename(folder)}/{name}"
    rows = list(values_of(open_parquet(path).read(use_threads=False)))
    if rows and not {"key", "status"} <= rows[0].keys():
        raise DataError(f"{path} has no columns key and status, so it is not img2dataset's")
    done = [row for row in rows if row["status"] == "success"]
    caption = config.caption_column
    if rows and caption != ReadConfig.caption_column:  # pictures may have been fetched without any
        caption = choose_column(list(rows[0]), config, "caption_column", (), path)
    table = pa.Table.from_pylist(
        [_entry(str(r["key"]), present.get(str(r["key"])), r, "image", caption) for r in done], INDEX
    )
    gone = sum(str(row["key"]) not in present for row in done)
    failed = len(rows) - len(done)
    notes = [f"{failed} rows were never downloaded and are not part of the input"] if failed else []
    unread = [row[caption] for row in done if isinstance(row.get(caption), BadSample)]
    if unread:
        notes.append(f"{len(unread)} texts are left out, the first as {unread[0]}")
    return table, f"{gone} images that its parquet names are gone" if gone else None, notes


class ListedReader:
    """Rows of a list, by the copy that the plan keeps."""

    def __init__(self, source: Source, config: ReadConfig, storage: Storage) -> None:
        from capfilt.plan import open_index

        self.root = config.image_root or os.path.dirname(source.path)
        # img2dataset's folder was listed by us, so that it may be a link; what the images in it are may not lead out.
        listed = source.path.endswith(".parquet") and not config.image_root
        self.folder = source.path.removesuffix(".parquet") if listed else None
        self.index: RowGroups = open_index(storage, source)

    def read(self, lo: int, hi: int) -> Iterator[Row]:
        for number, entry in zip(range(lo, hi), self.index.rows(lo, hi), strict=True):
            row = Row(number, entry["key"], texts=entry["texts"] or [], extra=json.loads(entry["extra"]))
            if entry["image"] is None:
                row.problem = ("no_image", "no_image", entry.get("fault") or "no image path in the row")
            else:
                name, root = entry["image"], self.root
                if self.folder:
                    name, root = os.path.basename(name), self.folder
                row.image, row.problem = read_image(name, root)
            yield row
