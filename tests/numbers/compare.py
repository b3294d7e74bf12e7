"""Compare two records of tests/numbers/record.py to the bit; it is a failure where nothing is compared.

    python -m tests.numbers.compare BEFORE.json AFTER.json
    python -m tests.numbers.compare BEFORE.json AFTER.json --renamed names.json     # {"old tensor": "new tensor"}

Prints how many values were compared in each section and each difference with its place. Exit status: 0 when all is
equal, 1 when something differs, is missing or nothing was compared, 2 for records that cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHOWN = 20
"""Differences that are printed of a section."""
_MISSING = "nothing"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that stands in dictionaries and lists, with where it stands; their lengths too."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}/{name}")
    elif isinstance(value, list):
        yield f"{path}/length", len(value)
        for place, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{place}")
    else:
        yield path, value


def equal(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two values are the same, numbers within a tolerance, relative or absolute; 1 is not true, nor 1.0 "1"."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance) or (one != one and other != other)
    return one == other


def differences(before: Any, after: Any, tolerance: float = 0.0) -> tuple[int, list[str]]:
    """How many values were compared, and a line for each that differs or is on one side only."""
    there, here = dict(leaves(before)), dict(leaves(after))
    compared, lines = 0, []
    for path in [*there, *(path for path in here if path not in there)]:
        one, other = there.get(path, _MISSING), here.get(path, _MISSING)
        compared += path in there and path in here
        if not (path in there and path in here and equal(one, other, tolerance)):
            lines.append(f"{path}: {one!r} before, {other!r} after")
    return compared, lines


def renamed(section: Any, table: dict[str, str]) -> Any:
    """A section whose tensors have their new names; the table's keys are regular expressions of whole names."""

    def new(name: str) -> str:
        for pattern, replacement in table.items():
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    if not isinstance(section, dict):
        return section
    return {
        name: {new(tensor): value for tensor, value in inner.items()} if name == "weights" else renamed(inner, table)
        for name, inner in section.items()
    }


def without_names(section: Any) -> Any:
    """A section whose tensors are counted by what they hold, whatever they are called."""
    if not isinstance(section, dict):
        return section
    return {
        name: dict(sorted(Counter(inner.values()).items())) if name == "weights" else without_names(inner)
        for name, inner in section.items()
    }


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.0) -> bool:
    """Print what two records have in common and where they differ; whether all of one is in the other."""
    total, same = 0, True
    for name in [*before, *(name for name in after if name not in before)]:
        if name == "machine":
            continue
        compared, lines = differences(before.get(name, {}), after.get(name, {}), tolerance)
        total, same = total + compared, same and compared > 0 and not lines
        verdict = f"{len(lines)} differ" if lines else "equal" if compared else "nothing to compare"
        print(f"{name:<22}{compared:>7,} values compared, {verdict}")
        for line in lines[:SHOWN]:
            print(f"    {name}{line[:300]}")
        if len(lines) > SHOWN:
            print(f"    and {len(lines) - SHOWN:,} more")
    print(f"{total:,} values compared: {'all equal' if same and total else 'NOT EQUAL'}")
    return same and total > 0


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("tests.numbers.compare", description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--renamed", type=Path, help="JSON of tensor names that changed: {old: new}, old as a pattern")
    parser.add_argument("--any-name", action="store_true", help="tensors are equal whatever they are called")
    parser.add_argument("--only", nargs="+", help="sections to compare (default: all)")
    given = parser.parse_args(args)
    before, after = (json.loads(path.read_text()) for path in (given.before, given.after))
    if before["machine"] != after["machine"]:
        _, lines = differences(before["machine"], after["machine"])
        sys.stderr.write(
            "error: the records are of different machines or libraries, which round differently: record both on one\n"
            + "".join(f"    {line}\n" for line in lines)
        )
        raise SystemExit(2)
    if given.renamed:
        before = renamed(before, json.loads(given.renamed.read_text()))
    if given.any_name:
        before, after = without_names(before), without_names(after)
    if given.only:
        before, after = ({name: one.get(name, {}) for name in given.only} for one in (before, after))
    raise SystemExit(0 if compare(before, after) else 1)


if __name__ == "__main__":
    main()
