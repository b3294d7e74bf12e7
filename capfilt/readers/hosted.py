"""Data sets of the `datasets` library: folders written by save_to_disk, and names on the hub."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip.data.errors import DataError
from capfilt.readers.parquet import columns_of, row_of_values
from capfilt.readers.rows import Row, Source, content_of
from capfilt.settings import ReadConfig

HUB = "hf:"


@functools.lru_cache(maxsize=4)
def open_dataset(path: str, split: str | None) -> Any:
    """A `datasets.Dataset`. DataError says what it is instead, or which splits there are."""
    import datasets

    try:
        if path.startswith(HUB):
            name, _, revision = path.removeprefix(HUB).partition("@")
            data = datasets.load_dataset(name, split=split, revision=revision or None)
        else:
            data = datasets.load_from_disk(path)
    except Exception as error:  # datasets raises what its readers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is no data set that can be opened: {reason}") from None
    if isinstance(data, dict):
        if split not in data:
            raise DataError(f"{path}: set --split to one of {', '.join(data)}, got {split!r}")
        data = data[split]
    return data


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
    columns_of(data.column_names, config, path)
    size = sum(os.path.getsize(f["filename"]) for f in data.cache_files)
    return len(data), size, hosted_content(path) or hashlib.sha256(data._fingerprint.encode()).hexdigest()[:16]


class HostedReader:
    """Rows of a data set, images undecoded."""

    def __init__(self, source: Source, config: ReadConfig) -> None:
        import datasets

        data = open_dataset(source.path, config.split)
        self.image, self.caption = columns_of(data.column_names, config, source.path)
        if isinstance(data.features[self.image], datasets.Image):
            data = data.cast_column(self.image, datasets.Image(decode=False))
        self.data = data
        self.root = config.image_root or (source.path if not source.path.startswith(HUB) else "")
        self.cache = os.path.realpath(datasets.config.HF_CACHE_HOME)

    def read(self, lo: int, hi: int) -> Iterator[Row]:
        for number in range(lo, hi):
            values = self.data[number]
            yield row_of_values(number, values, self.image, self.caption, self._root(values))

    def _root(self, values: dict[str, Any]) -> str:
        """Files in the cache that the hub fills itself may be opened; others only under the image root."""
        content = values.get(self.image)
        path = content.get("path") if isinstance(content, dict) else content
        if isinstance(path, str) and os.path.isabs(path) and os.path.realpath(path).startswith(self.cache + "/"):
            return self.cache
        return self.root or self.cache
