"""Conditions on the scores of further scorers: `--least`, `--most aesthetic.score=5`, `--only language.web=en,de`.

A column with one value per web or synthetic text decides on these texts alone, any other on all texts of its row. Where
there is no score the condition is not met, for a reason of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from blip.errors import DataError
from capfilt.extra.load import EMBEDDING
from capfilt.extra.results import ExtraParts, scorers_of
from capfilt.run import Part, Run

_FORM = re.compile(r"(?P<scorer>[A-Za-z]\w*)\.(?P<column>[A-Za-z]\w*)=(?P<value>.*)\Z", re.ASCII | re.DOTALL)
_NUMBER = re.compile(r"u?int\d+|float|halffloat|double|bool")
_LIST = re.compile(r"list<\w+: (.*)>")
_ROUNDED = {"float": np.float32, "halffloat": np.float16}
"""Types that round: a bound of 0.7 is rounded alike, or a score of 0.7 would be below it."""


class Condition(NamedTuple):
    """A condition on a column of a scorer: one of some values, or a number within bounds."""

    scorer: str
    column: str
    values: tuple[str, ...] | None = None
    least: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        return f"{self.scorer}.{self.column}"

    def reason(self) -> str:
        if self.values is not None:
            return f"rule {self} not {','.join(self.values)}"
        return f"rule {self} above {self.most:g}" if math.isfinite(self.most) else f"rule {self} below {self.least:g}"

    def holds(self, value: Any) -> bool:
        if self.values is None:
            return self.least <= value <= self.most
        return (str(value).lower() if isinstance(value, bool) else str(value)) in self.values


def parse_bounds(texts: Sequence[str], bound: Literal["least", "most"]) -> list[Condition]:
    """Parse conditions like `aesthetic.score=5`. ValueError for one that is no such."""
    conditions = []
    for text in texts:
        match = _FORM.match(text)
        try:
            value = float(match["value"]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise ValueError(f"{bound} {text!r}: expected SCORER.COLUMN=NUMBER, such as aesthetic.score=5")
        conditions.append(Condition(match["scorer"], match["column"], **{bound: value}))
    return conditions


def parse_only(texts: Sequence[str]) -> list[Condition]:
    """Parse conditions like `language.web=en,de`. ValueError for one that is no such."""
    conditions = []
    for text in texts:
        match = _FORM.match(text)
        values = tuple(value.strip() for value in match["value"].split(",")) if match else ()
        if not all(values) or not values:
            raise ValueError(
                f"only {text!r}: expected web, syn or SCORER.COLUMN=VALUE,VALUE, such as language.web=en,de"
            )
        conditions.append(Condition(match["scorer"], match["column"], values))
    return conditions


class Conditions:
    """Conditions on the scores that a run has."""

    def __init__(self, run: Run, conditions: Sequence[Condition]) -> None:
        """Check that the run has the columns; DataError, with the remedy, if it does not."""
        self._parts = {one.scorer: scores_of(run, one.scorer) for one in conditions}
        self._whose: dict[Condition, str | None] = {}
        """Whose texts each condition decides on, web or syn; None for all of a row."""
        for one in conditions:
            columns = self._parts[one.scorer].record()["columns"]
            if one.column not in columns:
                raise DataError(f"{one}: the scorer {one.scorer} has the columns {', '.join(columns) or 'none'}")
            inner = _LIST.fullmatch(kind := columns[one.column])
            whose = next((name for name in ("web", "syn") if inner and one.column.startswith(name)), None)
            is_number = _NUMBER.fullmatch(inner[1] if inner else kind) is not None
            if (inner and not whose) or (one.values is None and not is_number):
                raise DataError(f"{one}: a condition of this kind cannot be put on a column of type {kind}")
            rounded = _ROUNDED.get(inner[1] if inner else kind, float)
            self._whose[one._replace(least=float(rounded(one.least)), most=float(rounded(one.most)))] = whose

    def reasons(self, part: Part, row: np.ndarray, index: np.ndarray, kinds: dict[str, np.ndarray]
                ) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
        """Yield reasons to drop texts, with the texts each applies to.

        `row` and `index` (T,) say which text of its row and source a text is, and `kinds` (T,) bool of which source.
        """
        tables = {name: read_table(parts, part) for name, parts in self._parts.items()}
        for one, whose in self._whose.items():
            rows = tables[one.scorer][one.column].to_pylist()
            mine = kinds[whose] if whose else np.ones(len(row), bool)
            places = zip(row[mine].tolist(), index[mine].tolist(), strict=True)
            values = [(rows[r][i] if rows[r] else None) if whose else rows[r] for r, i in places]
            lacking, failing = np.zeros(len(row), bool), np.zeros(len(row), bool)
            lacking[mine] = [value is None or value != value for value in values]
            failing[mine] = [value is not None and not one.holds(value) for value in values]
            yield f"rule no {one}", lacking
            yield one.reason(), failing


def scores_of(run: Run, name: str) -> ExtraParts:
    """Return the files of a scorer. DataError, with the remedy, if the run has none."""
    if name not in (there := scorers_of(run)):
        also = {"aesthetic": "aesthetic=MODEL"}.get(name, name if name in ("language", EMBEDDING) else "PATH.py:Class")
        raise DataError(
            f"{run.where} has no scores of {name} (it has those of: {', '.join(there) or 'none'}); add them with "
            f"`{run.command('score', '--also', also)}`"
        )
    return ExtraParts(run.storage, name)


def read_table(parts: ExtraParts, part: Part) -> Any:
    """Read a part's scores. DataError, with the remedy, if there are none yet."""
    try:
        return parts.table(part)
    except FileNotFoundError:
        raise lacking(parts, part) from None


def lacking(parts: ExtraParts, part: Part) -> DataError:
    return DataError(
        f"{parts.storage.root}/{parts.name(part.pid)} is missing: part {part.pid} has no scores of {parts.scorer} yet; "
        f"`capfilt score RUN --also {parts.scorer}`, as at first, adds them"
    )
