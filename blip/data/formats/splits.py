"""The rule for `split`, the same in every format: it selects rows if the data has splits, and is refused otherwise.

`train+val` is two splits. In lists a row's split is its column `split`; rows of parquet and tar files are never
selected, not even by a column of that name. Imports nothing heavy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blip.errors import DataError, shown

_NAMED = 20
"""Most splits that an error lists."""


def refuse_split(split: str | None, where: str | Path, kind: str) -> None:
    """Raise DataError if a split is requested of data without splits, such as `parquet sources` (`kind`)."""
    if split:
        raise DataError(f"{where}: {kind} have no splits; remove `split: {split}` and list only the files to use")


def parts_of(split: str) -> list[str]:
    """The names in `train+val`."""
    return list(dict.fromkeys(split.split("+")))


def of_split(
    rows: Iterable[tuple[int, Any]], split: str | None, file: Path, seen: Counter[str]
) -> Iterator[tuple[int, Any]]:
    """Yield the (number, row) of a file in a split, all of them if it is None; `seen` counts the rows of each split.

    A row without a split is in none; faults in place of unreadable rows are passed on. Raises DataError at the end of a
    file in which no row has a split.
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
