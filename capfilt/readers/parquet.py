"""Parquet files with images in them: bytes, {bytes, path}, or paths of files under a folder that the user named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip.data.formats.parquet import check_columns, parquet_file
from blip.data.images import MAX_BYTES
from blip.errors import BadSample
from capfilt.readers.rows import (
    Row,
    RowGroups,
    Source,
    choose_column,
    extra_of,
    is_remote,
    open_file,
    read_image,
    texts_of,
)
from capfilt.settings import ReadConfig

IMAGE_NAMES, CAPTION_NAMES = ("jpg", "file_name"), ("text", "TEXT")
"""Columns that img2dataset and image folders use instead of image and caption, where nobody asked for others."""


def open_parquet(path: str) -> pq.ParquetFile:
    """DataError that names the file if it is none."""
    return parquet_file(path, open_file(path) if is_remote(path) else None)


def columns_of(names: list[str], config: ReadConfig, where: str) -> tuple[str, str | None]:
    """The image and the caption column of a table; `none` as caption column means images without texts."""
    image = choose_column(names, config, "image_column", IMAGE_NAMES, where)
    return image, choose_column(names, config, "caption_column", CAPTION_NAMES, where)


def checked_columns(schema: pa.Schema, config: ReadConfig, where: str) -> tuple[str, str | None]:
    """`columns_of`, where each is there once and of a type that holds images or texts. DataError if not."""
    image, caption = columns_of(schema.names, config, where)
    check_columns(schema, where, image, caption, ("--image-column", "--caption-column"))
    return image, caption


class ParquetReader:
    """Rows of a parquet file."""

    def __init__(self, source: Source, config: ReadConfig) -> None:
        file = open_parquet(source.path)
        self.image, self.caption = checked_columns(file.schema_arrow, config, source.path)
        self.groups = RowGroups(open_file(source.path) if is_remote(source.path) else source.path)
        self.root = config.image_root or os.path.dirname(source.path)

    def read(self, lo: int, hi: int) -> Iterator[Row]:
        for number, values in zip(range(lo, hi), self.groups.rows(lo, hi), strict=True):
            yield row_of_values(number, values, self.image, self.caption, self.root)


def row_of_values(number: int, values: dict[str, Any], image: str, caption: str | None, root: str) -> Row:
    """A row of column values: image bytes, a path, or {bytes, path}; a text or a list of texts."""
    texts, content = values.get(caption) if caption else None, values.get(image)
    row = Row(number, _key(values, number), texts=texts_of(texts))
    row.extra = extra_of(values, image, *([caption] if caption else []))
    for value in (content, texts):
        if isinstance(value, BadSample):
            row.problem = ("source_error", "unreadable", value.reason)
            return row
    if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
    if isinstance(content, str):
        row.image, row.problem = read_image(content, root)
    elif isinstance(content, bytes) and len(content) <= MAX_BYTES:
        row.image = content
    elif isinstance(content, bytes):
        row.problem = ("too_large", "too_many_bytes", f"{len(content):,} bytes")
    else:
        row.problem = ("no_image", "no_image", "no image in the row")
    return row


def _key(values: dict[str, Any], number: int) -> str:
    key = values.get("key")
    return str(key) if isinstance(key, str | int) else str(number)
