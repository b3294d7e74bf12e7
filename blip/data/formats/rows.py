"""Rows as files hold them, the same in every format: which columns are image and caption, and what a row has in them.

A format has a file of its own here and gives rows in order (`rows`), by number where its files allow it, and says what
tells a file from others. `finding` says which files a path means; `sources` is training's access by number, and
`capfilt.reading` CapFilt's. Imports nothing heavy.
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
"""Rows of a file that are looked at for the columns there are, and of which one must be usable."""
NO_COLUMN = "none"
"""As caption column: images without captions."""
_KNOWN = {"image": ("jpg", "file_name"), "caption": ("text", "TEXT")}
"""Columns that img2dataset and image folders use, taken where nobody asked for another than the default."""


class Columns(NamedTuple):
    """The columns of images and captions, as asked for or as found."""

    image: str = "image"
    caption: str | None = "caption"


@dataclass(slots=True)
class StoredRow:
    """One row as it is stored: nothing is decoded, and no file that it names is opened."""

    number: int
    """From 0, in the file."""
    key: str
    """Its own key, or the number where it has none."""
    image: bytes | str | BadSample
    """Encoded, or the path of its file as the row says it, or why there is none."""
    captions: list[str] | BadSample
    """One or more, or why there is none; an empty list where no captions were asked for."""
    values: Mapping[str, Any]
    """All columns that were read."""
    columns: Columns
    """Which of them are image and caption."""

    def others(self) -> dict[str, Any]:
        """The other columns, as far as JSON can hold them: no bytes, and null for a number that is none."""
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


def choose_columns(names: Sequence[str], asked: Columns, where: str | Path) -> Columns:
    """Which of a file's columns are image and caption. DataError lists those there are, and the option to set."""
    return Columns(choose(names, asked, "image", where), choose(names, asked, "caption", where))


def choose(
    names: Sequence[str],
    asked: Columns,
    which: str,
    where: str | Path,
    *,
    known: bool = True,
) -> str | None:
    """The column of the image or the caption; None for captions of no column, `none`.

    `known` is whether one that other programs use in place of the default will do.
    """
    wanted = getattr(asked, which)
    if which == "caption" and wanted == NO_COLUMN:
        return None
    found = found_column(names, wanted, which) if known or wanted in names else None
    if found is not None:
        return found
    have = ", ".join(sorted(map(str, names)))[:200] or "nothing"
    raise DataError(f"{where} has no column {wanted!r} (it has: {have}); set {which}_column")


def found_column(names: Collection[str], wanted: str, which: str) -> str | None:
    """The column of the image or the caption, `wanted` or what is known to be used in place of the default; or None."""
    known = _KNOWN[which] if wanted == getattr(Columns(), which) else ()
    return next((name for name in (wanted, *known) if name in names), None)


def plain_columns(values: Mapping[str, Any], *taken: str | None) -> dict[str, Any]:
    """The columns that are not `taken`, as far as JSON can hold them."""
    found = {}
    for name, value in values.items():
        if name not in taken and not isinstance(value, bytes | BadSample):
            with contextlib.suppress(TypeError, ValueError, RecursionError):
                found[name] = json.loads(json.dumps(value, default=_as_text), parse_constant=lambda _: None)
    return found


def _as_text(value: Any) -> str | None:
    return None if isinstance(value, bytes) else str(value)
