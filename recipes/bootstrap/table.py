"""Tables of the bootstrapping experiment: means over seeds, paired differences, and the paper's findings.

Everything is computed from `scores[row][seed][column]`, in percent except ROC AUC.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from recipes.bootstrap.rows import ROWS, TEACHER

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
ENOUGH = 2.0
"""Standard errors that a difference must exceed to count."""


class Column(NamedTuple):
    """A column of the table."""

    name: str
    title: str
    group: str
    digits: int = 1


FINE, ZERO, TEXTS = "fine-tuned", "zero-shot", "the texts learned from"
COLUMNS = (
    Column("tr@1", "TR@1", FINE),
    Column("ir@1", "IR@1", FINE),
    Column("tr@1_zero_shot", "TR@1", ZERO),
    Column("ir@1_zero_shot", "IR@1", ZERO),
    Column("cider", "CIDEr", FINE),
    Column("attribute_precision", "claims true", FINE),
    Column("attribute_recall", "claims made", FINE),
    Column("cider_composition", "CIDEr", ZERO),
    Column("attribute_precision_composition", "claims true", ZERO),
    Column("attribute_recall_composition", "claims made", ZERO),
    Column("filter_auc", "filter AUC", TEXTS, 3),
    Column("noise_kept", "noise kept", TEXTS),
    Column("synthetic_wrong", "synthetic wrong", TEXTS),
)
MAIN = tuple(c for c in COLUMNS if c.name in ("tr@1", "ir@1", "tr@1_zero_shot", "ir@1_zero_shot"))
MAIN += tuple(c for c in COLUMNS if c.name in ("cider", "cider_composition"))
"""Columns by which rows are compared: retrieval and captions, fine-tuned and zero-shot."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error (None with one seed)."""

    value: float
    error: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """Mean of some values; None if there are none."""
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    @property
    def verdict(self) -> str:
        """Verdict on a difference: `higher`, `lower`, `open` (within two standard errors) or `one seed`."""
        if self.error is None:
            return "one seed"
        if abs(self.value) <= ENOUGH * self.error:
            return "open"
        return "higher" if self.value > 0 else "lower"

    def text(self, digits: int = 1, signed: bool = False) -> str:
        text = f"{self.value:{'+' if signed else ''}.{digits}f}"
        return text if self.error is None else f"{text} ± {self.error:.{digits}f}"


def means(scores: Scores, row: str, column: str) -> Mean | None:
    """Mean of a row over its seeds; None if the column does not apply to the row."""
    return Mean.of([by_column[column] for by_column in scores.get(row, {}).values() if column in by_column])


def difference(scores: Scores, row: str, other: str, column: str) -> Mean | None:
    """Mean difference between a row and another, paired by seed; None if no seed has both."""
    mine, theirs = scores.get(row, {}), scores.get(other, {})
    both = [seed for seed in mine if seed in theirs and column in mine[seed] and column in theirs[seed]]
    return Mean.of([mine[seed][column] - theirs[seed][column] for seed in both])


# What the paper found -------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A claim of the paper: one row is above another, or (`equal`) is not."""

    claim: str
    row: str
    other: str
    equal: bool = False


FINDINGS = (
    Comparison("captioning and filtering help", "both", "neither"),
    Comparison("filtering alone helps", "filter", "neither"),
    Comparison("captioning alone helps", "captioner", "neither"),
    Comparison("both help more than filtering alone", "both", "filter"),
    Comparison("both help more than captioning alone", "both", "captioner"),
    Comparison("a larger captioner and filter help more", "both_larger", "both"),
    Comparison("sampled captions are better training texts than beam-search ones", "both", "both_beam"),
    Comparison("captioner and filter are better as two models than as one", "both", "both_shared"),
    Comparison("training a new model gains more than continuing the old one", "both", "continued"),
    Comparison("longer training on the noisy texts gains nothing", "longer", "neither", equal=True),
    Comparison("cleaning gains more than longer training", "both", "longer"),
)


def findings(scores: Scores) -> list[dict[str, Any]]:
    """The paper's findings with the paired differences here, and in how many main columns these agree."""
    rows = []
    for one in FINDINGS:
        differences = {column.name: difference(scores, one.row, one.other, column.name) for column in MAIN}
        if any(value is None for value in differences.values()):
            continue
        verdicts = [value.verdict for value in differences.values()]
        rows.append(
            {
                **one._asdict(),
                "differences": {name: _plain(value) for name, value in differences.items()},
                "says": _agreement(one, verdicts),
            }
        )
    return rows


def _agreement(finding: Comparison, verdicts: Sequence[str]) -> str:
    if "one seed" in verdicts:
        return "undecided with one seed"
    agree = verdicts.count("higher") if not finding.equal else verdicts.count("open") + verdicts.count("lower")
    against = verdicts.count("lower") if not finding.equal else verdicts.count("higher")
    agreement = f"agrees in {agree} of {len(verdicts)}"
    return f"{agreement}, the other way in {against}" if against else agreement


def results(scores: Scores) -> dict[str, Any]:
    """All results as JSON: scores by row and seed, means, differences from the first row, findings."""
    columns = sorted({name for row in scores.values() for by_column in row.values() for name in by_column})
    rows = {}
    for row in (name for name in ROWS if name in scores):
        rows[row] = {
            "title": ROWS[row].title,
            "seeds": {str(seed): dict(by_column) for seed, by_column in sorted(scores[row].items())},
            "mean": {name: _plain(means(scores, row, name)) for name in columns},
            "difference": {name: _plain(difference(scores, row, TEACHER.name, name)) for name in columns},
        }
        for kind in ("mean", "difference"):
            rows[row][kind] = {name: value for name, value in rows[row][kind].items() if value is not None}
    return {"rows": rows, "findings": findings(scores)}


def _plain(mean: Mean | None) -> dict[str, Any] | None:
    return None if mean is None else {"value": mean.value, "error": mean.error, "seeds": mean.seeds}


# Tables ---------------------------------------------------------------------------------------------------------------

MARKS = {"higher": " ▲", "lower": " ▼", "open": "", "one seed": ""}


def main_table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Header and rows: means over seeds with their standard errors."""
    head = ["pre-trained on", *(f"{c.title}, {c.group}" for c in COLUMNS), "seeds"]
    rows = []
    for row in (name for name in ROWS if name in scores):
        cells = [(means(scores, row, column.name), column.digits) for column in COLUMNS]
        rows.append(
            [ROWS[row].title, *(mean.text(digits) if mean else "" for mean, digits in cells), str(len(scores[row]))]
        )
    return head, rows


def difference_table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Header and rows: paired differences from the first row, marked beyond two standard errors, and a verdict."""
    head = ["difference from neither", *(f"{c.title}, {c.group}" for c in MAIN), "beyond 2 standard errors"]
    rows = []
    for row in (name for name in ROWS if name in scores and name != TEACHER.name):
        paired = [difference(scores, row, TEACHER.name, column.name) for column in MAIN]
        if any(one is None for one in paired):
            continue
        verdicts = [one.verdict for one in paired]
        rows.append(
            [
                ROWS[row].title,
                *(one.text(column.digits, True) + MARKS[one.verdict] for one, column in zip(paired, MAIN, strict=True)),
                "one seed" if "one seed" in verdicts else _beyond(verdicts),
            ]
        )
    return head, rows


def _beyond(verdicts: Sequence[str]) -> str:
    counts = [f"{name} in {verdicts.count(name)}" for name in ("higher", "lower") if name in verdicts]
    return f"{', '.join(counts) or 'none'} of {len(verdicts)}"


def finding_table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the paper's findings, the differences that test them here, and whether they agree."""
    head = ["the paper's finding", *(f"{c.title}, {c.group}" for c in MAIN), "here"]
    rows = []
    for one in findings(scores):
        differences = [Mean(**dict(zip(("value", "error", "seeds"), value.values(), strict=True)))
                 for value in one["differences"].values()]  # fmt: skip
        cells = (mean.text(1, True) + MARKS[mean.verdict] for mean in differences)
        rows.append([one["claim"], *cells, one["says"]])
    return head, rows


def markdown(scores: Scores) -> str:
    """The three tables, as docs/bootstrap.md shows them."""
    parts = [_markdown(*table(scores)) for table in (main_table, difference_table, finding_table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
