"""Folders of image files: image folders with their metadata, and what img2dataset writes as `files`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from blip.data.formats.parquet import parquet_file, values_of
from blip.data.formats.rows import Columns, StoredRow, choose, row_of
from blip.data.formats.tars import IMAGES
from blip.errors import DataError

_METADATA = ("metadata.jsonl", "metadata.csv")


def metadata(folder: Path, *, within: bool = True) -> list[Path]:
    """The metadata files of a folder and of the folders in it: of each folder metadata.jsonl, or else metadata.csv."""
    folders = [folder, *sorted({file.parent for name in _METADATA for file in folder.glob(f"*/{name}")})]
    lists = (next((f for name in _METADATA if (f := at / name).is_file()), None) for at in folders)
    return [file for file in lists if file is not None and (within or file.parent == folder)]


def images_beside(file: Path) -> Path:
    """The folder whose images a parquet file of img2dataset describes."""
    return file.with_suffix("")


class Downloaded:
    """The images of one img2dataset folder, listed by the parquet file beside it."""

    def __init__(self, file: Path, requested: Columns):
        """DataError if the parquet file is another program's."""
        self.folder = images_beside(file)
        present = {}
        for name in sorted(os.listdir(self.folder)):
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() in IMAGES:
                present[stem] = f"{self.folder.name}/{name}"
        every = list(values_of(parquet_file(file).read(use_threads=False)))
        if every and not {"key", "status"} <= every[0].keys():
            raise DataError(f"{file} has no columns key and status, so it is not img2dataset's")
        self.values = [row for row in every if row["status"] == "success"]
        caption = requested.caption
        if every and caption != Columns().caption:  # images may have been fetched without any
            caption = choose(list(every[0]), requested, "caption", file)
        self.columns = Columns("image", caption)
        for row in self.values:
            row["image"] = present.get(str(row["key"]))
        self.failed = len(every) - len(self.values)
        """Number of rows that were never downloaded, which are not part of the data."""
        self.gone = sum(row["image"] is None for row in self.values)
        """Images that were there and are not any more."""

    def rows(self) -> Iterator[StoredRow]:
        for number, values in enumerate(self.values):
            yield row_of(number, values, self.columns)
