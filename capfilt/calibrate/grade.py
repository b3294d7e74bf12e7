"""Grade a filter on web texts whose truth is recorded in a column, as in the synthetic world."""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

import numpy as np

from capfilt.calibrate.threshold import auc
from capfilt.run import Run
from capfilt.select.choose import kept_of, scored_parts


class Kind(NamedTuple):
    """Fate of the web texts of one kind."""

    texts: int
    """Number of texts with a score."""
    kept: int
    auc: float | None
    """Probability that a right text scores above one of this kind; None for right texts, or if there are none."""


def grade(run: Run, select: str, *, column: str = "kind", right: str = "right") -> dict[str, Kind]:
    """Grade the filter on web texts by the kind that an input column records: `right`, or some way of being wrong.

    `select` names a selection. "wrong" is all kinds but `right` together. ValueError if no row has such a column.
    """
    kinds: dict[str, list[str]] = {}  # of the rows of each part
    margins: dict[str, list[float]] = {}
    for part in scored_parts(run):
        table = run.parts.read(part.pid, ["extra_json", "itm_margin_web"]).to_pylist()
        kinds[part.pid] = [str(json.loads(row["extra_json"]).get(column)) for row in table]
        for kind, row in zip(kinds[part.pid], table, strict=True):
            margins.setdefault(kind, []).extend(m for m in row["itm_margin_web"] if m is not None)
    if set(margins) <= {"None"}:
        raise ValueError(f"{run.where}: no row has a column {column!r} with the truth about its text")
    kept: Counter[str] = Counter()
    for part, texts in kept_of(run, select):
        rows = texts["row"].to_numpy()[np.asarray(texts["text_source"].to_pylist()) == "web"]
        kept.update(kinds[part.pid][row] for row in rows)
    wrong = [kind for kind in margins if kind != right]
    margins["wrong"] = [margin for kind in wrong for margin in margins[kind]]
    kept["wrong"] = sum(kept[kind] for kind in wrong)
    good = np.array(margins.get(right, []))

    def against(kind: str) -> float | None:
        values = np.array(margins[kind])
        return auc(good, values) if kind != right and len(good) and len(values) else None

    return {kind: Kind(len(values), kept[kind], against(kind)) for kind, values in sorted(margins.items())}
