"""Lists of {image, caption}: JSON, JSON lines, CSV, Karpathy's splits and COCO's captions."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from blip.data.formats.json_rows import Note, rows_or_faults
from blip.data.formats.rows import FIRST_ROWS, Columns, StoredRow, choose_columns, row_of
from blip.data.formats.splits import of_split
from blip.errors import BadSample, DataError


def rows(
    file: Path,
    requested: Columns,
    split: str | None = None,
    seen: Counter[str] | None = None,
    note: Note | None = None,
) -> Iterator[StoredRow]:
    """The rows of a file that are of a split, those that cannot be used included; never all of them at once.

    `seen` counts the splits there are, `note` is told what is left out. DataError names the file and the row where the
    file is at fault, or if none of its first rows has the columns.
    """
    parsed = of_split(rows_or_faults(file, note), split, file, Counter() if seen is None else seen)
    first = list(itertools.islice(parsed, FIRST_ROWS))
    names = list(dict.fromkeys(str(name) for _, values in first if isinstance(values, dict) for name in values))
    if first and not names:
        number, values = first[0]
        reason = values.reason if isinstance(values, BadSample) else "has no columns"
        raise DataError(
            f"{file}: row {number}: the row {reason}, and no other of its first {len(first)} rows is better"
        )
    columns = choose_columns(names, requested, file) if first else requested
    for number, values in itertools.chain(first, parsed):
        if isinstance(values, BadSample):
            fault = BadSample(f"the row {values.reason}", "no_image")
            yield StoredRow(number, str(number), fault, fault, {}, columns)
        else:
            yield row_of(number, values, columns)
