"""CSV files, read strictly: what would cut a field short or swallow rows refuses the file, with the line."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from blip.errors import DataError

_LONGEST = 64 << 20
"""Characters of the longest line and field."""
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars (|)"}
_SUFFIX = re.compile(r"\.\w{1,5}\Z")


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line from 1, row) of a file, rows by the names in its header; columns without a name are left out.

    Raises as `csv_records`, and DataError for a header in which a name is repeated or no column has one.
    """
    records = csv_records(path)
    line, names = next(records, (0, []))
    if not names:
        raise DataError(f"{path} is empty; expected a header, such as image,caption, and rows")
    names = [name.strip() for name in names]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: line {line}: duplicate column {twice!r} in the header; rename one of them")
    if not any(names):
        raise DataError(f"{path}: line {line}: the header names no column; expected a header such as image,caption")
    named = [(at, name) for at, name in enumerate(names) if name]
    for line, fields in records:
        yield line, {name: fields[at] for at, name in named}


def csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line from 1, fields) of each record; blank lines are skipped. Tabs or semicolons may be separators, too.

    Raises DataError, naming the line, for a record with another number of fields than the first, a quotation mark that
    is never closed or is followed by text, a NUL character, and text that is not UTF-8.
    """
    csv.field_size_limit(_LONGEST)
    begins, before = 1, 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = _lines(path, file)
            first = next(lines, "")
            while first and not first.strip():
                before, first = before + 1, next(lines, "")
            if not first:
                return
            begins = before + 1
            separator = _separator(path, begins, first)
            reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
            width = 0
            for fields in reader:
                ends = before + reader.line_num
                if fields:
                    width = width or len(fields)
                    if len(fields) != width:
                        raise DataError(_uneven(path, begins, len(fields), width, separator))
                    if ends > begins and width > 1 and _swallowed(separator.join(fields), width, separator):
                        raise DataError(
                            f"{path}: line {begins}: a quotation mark is opened that takes the rows up to line {ends} "
                            f"into one field; {_CURE}"
                        )
                    yield begins, fields
                begins = ends + 1
    except UnicodeDecodeError as error:
        where = f"{path}: line {_undecodable(path)}"
        raise DataError(f"{where} is not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: line {begins}: {_reason(error)}; {_CURE}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


_CURE = 'put a field that holds quotation marks, separators or line ends in "..." and double the marks within'


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(_LONGEST)
        if not line:
            return
        if "\0" in line:
            raise DataError(f"{path}: line {number} holds NUL characters: damage, or UTF-16 text; expected UTF-8")
        if len(line) == _LONGEST:
            raise DataError(f"{path}: line {number} is longer than {_LONGEST:,} characters; is it a CSV file?")
        yield line


def _separator(path: Path, line: int, header: str) -> str:
    """Separator that gives the header the most fields; a comma if there is none."""
    widths = {mark: len(next(csv.reader([header], delimiter=mark))) for mark in _SEPARATORS}
    mark = max(widths, key=lambda mark: widths[mark])  # the first of equals
    if mark == "|":
        raise DataError(
            f"{path}: line {line}: the fields are separated by {_SEPARATORS[mark]}; expected commas, tabs or semicolons"
        )
    return mark


def _uneven(path: Path, line: int, count: int, expected: int, separator: str) -> str:
    marks = _SEPARATORS[separator]
    return (
        f"{path}: line {line} has {count} field{'s' * (count != 1)} where the first line has {expected} (separated by "
        f"{marks}); {_CURE}"
    )


def _swallowed(text: str, width: int, separator: str) -> bool:
    """Whether two lines of one record look like rows: as wide, and beginning or ending with files or ids alike."""
    rows = [row for row in (line.split(separator) for line in text.splitlines()) if len(row) >= width]
    return any(_similar(a[at], b[at]) for a, b in itertools.pairwise(rows) for at in (0, -1))


def _similar(a: str, b: str) -> bool:
    one, other = _SUFFIX.search(a), _SUFFIX.search(b)
    if one and other:
        return one[0].lower() == other[0].lower()
    return len(a) < 20 and a.isdecimal() and b.isdecimal() and int(b) == int(a) + 1


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _reason(error: csv.Error) -> str:
    message = str(error)
    if "unexpected end" in message or "larger than field limit" in message:
        return "a quotation mark is opened and never closed"
    return "text follows a closing quotation mark" if "expected after" in message else message
