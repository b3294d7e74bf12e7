"""Data sets of the `datasets` library: folders written by save_to_disk, and names on the hub."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capfilt.readers.parquet import checked_columns, row_of_values
from capfilt.readers.rows import Row, Source, content_of
from capfilt.settings import ReadConfig

HUB = "hf:"


@functools.lru_cache(maxsize=4)
def open_dataset(path: str, split: str | None) -> Any:
    """A `datasets.Dataset`. DataError says what it is instead, or which splits there are."""
    from blip.data.formats import hosted

    name, _, revision = path.removeprefix(HUB).partition("@") if path.startswith(HUB) else (path, "", "")
    return hosted.open_dataset(name, split, revision or None, "--split")


def is_dataset(path: str) -> bool:
    return any(Path(path, name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def hosted_content(path: str) -> str | None:
    """A hash of a saved data set's files; None for one on the hub, whose revision fixes it."""
    if path.startswith(HUB):
        return None
    h = hashlib.sha256()
    for file in sorted(Path(path).rglob("*.arrow")):
        h.update(f"{file.relative_to(path)} {content_of(str(file))}".encode())
    return h.hexdigest()[:16]


def describe(path: str, config: ReadConfig) -> tuple[int, int, str]:
    """(rows, bytes, content hash) of a data set. DataError if its columns do not fit."""
    data = open_dataset(path, config.split)
    checked_columns(data.features.arrow_schema, config, path)
    size = sum(os.path.getsize(f["filename"]) for f in data.cache_files)
    return len(data), size, hosted_content(path) or hashlib.sha256(data._fingerprint.encode()).hexdigest()[:16]


class HostedReader:
    """Rows of a data set, images undecoded."""

    def __init__(self, source: Source, config: ReadConfig) -> None:
        self.data = open_dataset(source.path, config.split)
        self.image, self.caption = checked_columns(self.data.features.arrow_schema, config, source.path)
        self.root = config.image_root or (source.path if not source.path.startswith(HUB) else "")

    def read(self, lo: int, hi: int) -> Iterator[Row]:
        from blip.data.formats.hosted import rows_at

        for number, values in zip(range(lo, hi), rows_at(self.data, lo, hi), strict=True):
            yield row_of_values(number, values, self.image, self.caption, self._root(values))

    def _root(self, values: dict[str, Any]) -> str:
        """Files in the cache that the hub fills itself may be opened; others only under the image root."""
        from blip.data.formats.hosted import CACHE, in_cache

        content = values.get(self.image)
        path = content.get("path") if isinstance(content, dict) else content
        return CACHE if isinstance(path, str) and in_cache(path) else self.root or CACHE
