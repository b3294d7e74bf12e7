"""Stored rows, the same for every format: the columns of image and caption, and their values in a row.

Each format has a file here that gives rows in order (`rows`), by number if its files allow that, and the identity of a
file. `finding` resolves a path to files; `sources` is training's access by number, and `capfilt.reading` CapFilt's.
Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from blip.data.formats.values import captions_of, image_of
from blip.errors import BadSample, DataError

FIRST_ROWS = 64
"""Rows at the start of a file that are checked for its columns, and of which one must be usable."""
NO_COLUMN = "none"
"""Value of the caption column for images without captions."""
_KNOWN = {"image": ("jpg", "file_name"), "caption": ("text", "TEXT")}
"""Columns that img2dataset and image folders use, accepted in place of the default names."""


class Columns(NamedTuple):
    """The columns of images and captions, as configured or as chosen from those of a file."""

    image: str = "image"
    caption: str | None = "caption"


def columns_of(settings: Any) -> Columns:
    """The columns that settings of a source name, training's or CapFilt's."""
    return Columns(settings.image_column, settings.caption_column)


@dataclass(slots=True)
class StoredRow:
    """One stored row: nothing is decoded, and no file that it names is opened."""

    number: int
    """Number of the row in its file, from 0."""
    key: str
    """Key of the row, or its number if it has none."""
    image: bytes | str | BadSample
    """Encoded image, the path of its file as given in the row, or the reason why there is none."""
    captions: list[str] | BadSample
    """Captions, one or more, or the reason why there is none; an empty list if none were requested."""
    values: Mapping[str, Any]
    """Values of all columns that were read."""
    columns: Columns
    """Names of the image and caption columns among them."""

    def others(self) -> dict[str, Any]:
        """The other columns as far as JSON can represent them: no bytes, and null for NaN and infinity."""
        return plain_columns(self.values, *self.columns)


class Format(Protocol):
    """One file or data set, opened."""

    def __len__(self) -> int: ...

    def rows(self, lo: int, hi: int) -> Iterator[StoredRow]:
        """Rows lo to hi (exclusive), in order."""


def row_of(number: int, values: Mapping[str, Any], columns: Columns) -> StoredRow:
    """A row by the values of its columns, any of which may be the BadSample that reading it has given."""
    image: bytes | str | BadSample
    captions: list[str] | BadSample
    try:
        image = image_of(values[columns.image])
    except KeyError:
        image = _without(values, columns.image, "no_image")
    except BadSample as error:
        image = error
    try:
        captions = [] if columns.caption is None else captions_of(values[columns.caption])
    except KeyError:
        captions = _without(values, columns.caption, "no_caption")
    except BadSample as error:
        captions = error
    key = values.get("key")
    return StoredRow(number, str(key if isinstance(key, str | int) else number), image, captions, values, columns)


def _without(values: Mapping[str, Any], column: str, code: str) -> BadSample:
    have = ", ".join(sorted(map(str, values)))[:200] or "nothing"
    return BadSample(f"the row has no {column!r} (it has: {have})", code)


def choose_columns(names: Sequence[str], requested: Columns, where: str | Path) -> Columns:
    """Choose the image and caption columns of a file. DataError lists those there are, and the option to set."""
    return Columns(choose(names, requested, "image", where), choose(names, requested, "caption", where))


def choose(
    names: Sequence[str],
    requested: Columns,
    which: str,
    where: str | Path,
    *,
    known: bool = True,
) -> str | None:
    """The column of the image or the caption; None for the caption column `none`.

    With `known`, column names of other programs are accepted in place of the default.
    """
    wanted = getattr(requested, which)
    if which == "caption" and wanted == NO_COLUMN:
        return None
    column = find_column(names, wanted, which) if known or wanted in names else None
    if column is not None:
        return column
    have = ", ".join(sorted(map(str, names)))[:200] or "nothing"
    raise DataError(f"{where} has no column {wanted!r} (it has: {have}); set {which}_column")


def find_column(names: Collection[str], wanted: str, which: str) -> str | None:
    """The column of the image or the caption: `wanted`, or a name known to be used in place of the default, or None."""
    known = _KNOWN[which] if wanted == getattr(Columns(), which) else ()
    return next((name for name in (wanted, *known) if name in names), None)


def plain_columns(values: Mapping[str, Any], *taken: str | None) -> dict[str, Any]:
    """The columns that are not `taken`, as far as JSON can represent them."""
    plain = {}
    for name, value in values.items():
        if name not in taken and not isinstance(value, bytes | BadSample):
            with contextlib.suppress(TypeError, ValueError, RecursionError):
                plain[name] = _decode(_encode(value))
    return plain


def _as_text(value: Any) -> str | None:
    return None if isinstance(value, bytes) else str(value)


_encode = json.JSONEncoder(default=_as_text).encode  # made once: json.dumps and json.loads make theirs for each value
_decode = json.JSONDecoder(parse_constant=lambda _: None).decode
