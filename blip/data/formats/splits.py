"""The one rule for `split`, in every format: it chooses where the data says splits, and is refused where it does not.

`train+val` is two splits. Lists say a row's split in its `split`; the rows of parquet and tar files are never chosen,
not even by a column of that name. Imports nothing heavy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blip.errors import DataError, shown

_NAMED = 20
"""Splits that an error names."""


def refuse_split(split: str | None, where: str | Path, kind: str) -> None:
    """Raise DataError for a split asked of data that has none, as `parquet sources` (`kind`): all would be taken."""
    if split:
        raise DataError(f"{where}: {kind} have no splits; remove `split: {split}` and list only the files to use")


def parts_of(split: str) -> list[str]:
    """The names in `train+val`."""
    return list(dict.fromkeys(split.split("+")))


def of_split(
    rows: Iterable[tuple[int, Any]], split: str | None, file: Path, seen: Counter[str]
) -> Iterator[tuple[int, Any]]:
    """The (number, row) of a file that are of a split, all of them if it is None; `seen` counts the splits there are.

    A row without a split is of none; what stands in place of an unreadable row is passed on. Raises DataError at the
    end of a file of which no row has a split.
    """
    if not split:
        yield from rows
        return
    wanted, known, any_row = set(parts_of(split)), False, False
    for number, row in rows:
        if not isinstance(row, dict):
            yield number, row
            continue
        any_row = True
        known = known or "split" in row
        name = row.get("split")
        if isinstance(name, str | int):
            seen[str(name)] += 1
            if str(name) in wanted:
                yield number, row
    if any_row and not known:
        refuse_split(split, file, "its rows")


def check_split(split: str | None, where: str | Path, seen: Counter[str]) -> None:
    """Raise DataError, listing the splits, if a requested one is not among those `seen`."""
    missing = [name for name in parts_of(split or "") if name not in seen] if split else []
    if missing:
        names = ", ".join(f"{shown(name)[1:-1]} ({count:,})" for name, count in sorted(seen.items())[:_NAMED])
        raise DataError(
            f"{where}: no rows of split {' or '.join(map(repr, missing))}; there are: "
            f"{names or 'none'}{', ...' * (len(seen) > _NAMED)}"
        )
