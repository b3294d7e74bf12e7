"""The rows of the table: which texts each model is pre-trained on, and what it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TableRow:
    """A row of the table: one way to learn from a noisy crawl."""

    name: str
    title: str
    cleaner: str | None = None
    """CapFilt job that made the training texts; None for the crawl as it is."""
    keep: str = "both"
    """Selection of the job's texts: one of `CLEANERS`."""
    continued: bool = False
    """Whether training continues from the model of the first row instead of starting from scratch."""
    longer: bool = False
    """Whether to train for more steps."""


TEACHER = TableRow("neither", "neither: the crawl as it is")
"""The first row; captioner and filter are fine-tuned from its model."""
ROWS = {
    row.name: row
    for row in (
        TEACHER,
        TableRow("filter", "filter only", "own", "filter"),
        TableRow("captioner", "captioner only", "own", "captioner"),
        TableRow("both", "captioner and filter", "own"),
        TableRow("both_larger", "both, larger captioner and filter", "larger"),
        TableRow("both_beam", "both, beam search instead of sampling", "beam"),
        TableRow("both_shared", "both, captioner and filter one model", "shared"),
        TableRow("continued", "both, the old model trained on", "own", continued=True),
        TableRow("longer", "neither, trained longer", longer=True),
    )
}


CLEANERS: dict[str, Callable[[float], list[str]]] = {
    "filter": lambda least: ["--policy", "blip", "--itm", str(least), "--only", "web"],
    "captioner": lambda least: ["--policy", "blip", "--itm", "0"],
    "both": lambda least: ["--policy", "blip", "--itm", str(least)],
}
"""Options of `capfilt select` that keep the web texts that pass, all texts of both kinds, or all texts that pass.

No score is below 0, so `--itm 0` keeps all.
"""
