"""The interface of further scorers, and the check of what they return."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from blip.errors import DataError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
RESERVED = ("embedding", "failures")
"""Names under extra/ that no scorer can have."""
_OURS = ("sample_id", "error")
"""Columns that every table of further scores has."""


class RowTexts(NamedTuple):
    """The texts of an image: the crawl's own, as they are there, and the synthetic ones."""

    web: list[str]
    syn: list[str]


class ExtraScorer(Protocol):
    """A scorer of images and texts beyond captioner and filter; it sees the rows whose image could be used.

    The scores of a row must not depend on the rest of the batch.
    """

    name: str
    """Name of its folder in the run, and before the point in `--least NAME.COLUMN=5`: letters, digits and _."""
    side: int
    """Side of the images that it scores, pixels; 0 if it scores texts only and gets no images."""
    identity: dict[str, Any]
    """Everything that decides its scores, such as model, revision and SHA-256 of the weights, in types of JSON."""
    columns: dict[str, pa.DataType]
    """Columns of scores. A list column whose name begins with `web` or `syn` has a value per such text of a row."""

    def score(self, images: Sequence[np.ndarray], texts: Sequence[RowTexts]) -> dict[str, list]:
        """Return for each column a list with one value per row, None where there is no score.

        Images are RGB, (side, side, 3) uint8, scaled without regard to their aspect ratio. A row for which this raises
        an exception is recorded with it and has no scores.
        """


class WrongScorer(DataError):
    """A scorer does not do what `ExtraScorer` says."""


def parallel_to(column: str, kind: pa.DataType) -> str | None:
    """Return which texts a column has a value for each of, `web` or `syn`; None if it does not."""
    return next((one for one in ("web", "syn") if column.startswith(one) and pa.types.is_list(kind)), None)


def check_scorer(scorer: Any, spec: str) -> None:
    """Raise WrongScorer, naming the attribute, if a scorer lacks something or has it of another type."""
    for name, kind in (("name", str), ("side", int), ("identity", dict), ("columns", dict)):
        value = getattr(scorer, name, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise WrongScorer(f"scorer {spec}: its {name} must be of type {kind.__name__}, got {value!r:.60}")
    if not _NAME.match(scorer.name) or scorer.name in RESERVED:
        raise WrongScorer(
            f"scorer {spec}: its name {scorer.name!r} must be letters, digits and _, and none of {', '.join(RESERVED)}"
        )
    if not 0 <= scorer.side <= 4096:
        raise WrongScorer(f"scorer {spec}: its side must be 0 to 4096 pixels, got {scorer.side}")
    if not scorer.columns:
        raise WrongScorer(f"scorer {spec}: it has no columns")
    for column, kind in scorer.columns.items():
        if not isinstance(column, str) or not _NAME.match(column) or column in _OURS:
            raise WrongScorer(
                f"scorer {spec}: column {column!r} must be letters, digits and _, not {' or '.join(_OURS)}"
            )
        if not isinstance(kind, pa.DataType):
            raise WrongScorer(f"scorer {spec}: the type of column {column} must be of pyarrow, got {kind!r:.60}")
    if not callable(getattr(scorer, "score", None)):
        raise WrongScorer(f"scorer {spec}: it has no method score(images, texts)")


def check_scores(scorer: ExtraScorer, values: Any, texts: Sequence[RowTexts]) -> list[dict[str, Any]]:
    """Return what a scorer gave as one mapping per row. WrongScorer names the column, and what is wrong with it."""

    def wrong(what: str) -> WrongScorer:
        return WrongScorer(f"scorer {scorer.name}: {what}")

    if not isinstance(values, Mapping):
        raise wrong(f"score() must return a dictionary of columns, got {type(values).__name__}")
    if values.keys() != scorer.columns.keys():
        raise wrong(f"score() must return the columns {', '.join(scorer.columns)}, got {', '.join(map(str, values))}")
    for column, kind in scorer.columns.items():
        several = values[column]
        if not _is_list(several):
            raise wrong(f"column {column} must be a list, got {type(several).__name__}")
        if len(several) != len(texts):
            raise wrong(f"column {column} has {len(several)} values for {len(texts)} rows")
        whose = parallel_to(column, kind)
        for value, row in zip(several, texts, strict=True):
            if not _fits(value, kind):
                raise wrong(f"column {column} must be {kind}, got {value!r:.60}")
            if whose and value is not None and len(value) != len(getattr(row, whose)):
                raise wrong(f"column {column} has {len(value)} values for the {len(getattr(row, whose))} {whose} texts")
    columns = {column: _array(values[column], kind, column, wrong) for column, kind in scorer.columns.items()}
    return [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)]


def _array(values: Iterable[Any], kind: pa.DataType, column: str, wrong: Callable[[str], WrongScorer]) -> list:
    try:
        return pa.array(list(values), kind).to_pylist()
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise wrong(f"column {column} must be {kind}: {str(error).splitlines()[0]}") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Tell whether a value is of a type without being converted; pyarrow would make 1 of 1.5 and of True."""
    if value is None:
        return True
    if pa.types.is_list(kind):
        return _is_list(value) and all(_fits(one, kind.value_type) for one in value)
    if pa.types.is_boolean(kind):
        return isinstance(value, bool | np.bool_)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        number = numbers.Integral if pa.types.is_integer(kind) else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool | np.bool_)
    return isinstance(value, str) if pa.types.is_string(kind) else True
