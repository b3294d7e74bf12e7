"""The labelled audit: a sheet of texts drawn from all scores, labelled by a person, read back with intervals."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blip.app import html
from blip.data.formats.csv_rows import csv_rows
from capfilt.run import Run
from capfilt.select.choose import Whole, scored_parts
from capfilt.select.copies import Copies

_STRATA = 10
_COLUMNS = ("id", "source", "score", "weight", "text", "match")
_STEPS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Label:
    """A text with its human label."""

    id: str
    source: str
    score: float
    weight: float
    """Number of texts of the run that the label represents."""
    match: bool


def write(run: Run, count: int) -> list[str]:
    """Write report/audit.csv, to be filled in, and report/audit.html with the images; returns instructions to print."""
    drawn = draw(run, count)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(_COLUMNS)
    for entry in drawn:
        writer.writerow([entry["id"], entry["source"], f"{entry['score']:.6f}", f"{entry['weight']:.4f}",
                         _harmless(entry["text"]), ""])  # fmt: skip
    run.storage.write("report/audit.csv", buffer.getvalue().encode())
    run.storage.write("report/audit.html", _page(run, drawn).encode())
    return [
        f"{len(drawn)} texts drawn from all scores. Open {run.storage.root}/report/audit.html, write y or n into the "
        f"column match of {run.storage.root}/report/audit.csv, and run",
        f"  capfilt calibrate {run.where} --labels {run.storage.root}/report/audit.csv",
        "Judge before you look at scores: the page does not show them.",
    ]


def _harmless(text: str) -> str:
    """Make a text safe for CSV, and prevent spreadsheets from reading it as a formula."""
    text = " ".join(text.replace("\0", " ").split())
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def draw(run: Run, count: int) -> list[dict]:
    """Draw texts by hash, equally many from each decile of each source's scores, with their weights."""
    candidates: dict[tuple[str, int], list[tuple[str, float, str, int, int]]] = {}
    sizes: dict[tuple[str, int], int] = {}
    each = max(1, count // (2 * _STRATA))
    for part in scored_parts(run):
        table = run.parts.read(part.pid, ["sample_id", "itm_web", "itm_syn", "web_text", "syn_text"])
        for row, note in enumerate(table.to_pylist()):
            for kind in ("web", "syn"):
                for i, score in enumerate(note[f"itm_{kind}"] or []):
                    if score is None:
                        continue
                    key = kind, min(int(score * _STRATA), _STRATA - 1)
                    sizes[key] = sizes.get(key, 0) + 1
                    mark = hashlib.sha256(f"audit {note['sample_id']} {kind} {i}".encode()).hexdigest()[:16]
                    candidates.setdefault(key, []).append((mark, score, part.pid, row, i))
                    if len(candidates[key]) > 4 * each:
                        candidates[key] = sorted(candidates[key])[:each]
    drawn = []
    for (kind, tenth), some in candidates.items():
        chosen = sorted(some)[:each]
        for mark, score, pid, row, i in chosen:
            text = run.parts.read(pid, [f"{kind}_text"])[f"{kind}_text"][row].as_py()[i]
            weight = sizes[kind, tenth] / len(chosen)
            drawn.append({"id": mark, "source": kind, "score": score, "weight": weight, "text": text, "at": (pid, row)})
    return sorted(drawn, key=lambda entry: entry["id"])


def _page(run: Run, drawn: Sequence[dict]) -> str:
    from capfilt.report.page import Cards
    from capfilt.select.policies import SelectConfig

    cards = Cards(run, SelectConfig(), Whole(Copies()))
    items = [
        html.Card(cards.image(*entry["at"]), entry["id"], [html.Line(entry["text"])], entry["id"]) for entry in drawn
    ]
    return html.page(
        "audit.html",
        title="Does the text say what the image shows?",
        kind=f"CapFilt audit · {run.where}",
        lead="Write y or n into the column match of audit.csv, in the row with the id of the card.",
        cards=items,
    )


# Reading --------------------------------------------------------------------------------------------------------------


def read(run: Run, labels: str, target: float) -> list[str]:
    """Estimate precision and recall by threshold, for web and synthetic texts; returns lines to print."""
    judged = read_labels(Path(labels))
    lines = [f"{len(judged)} labels; intervals are 95% Wilson at the effective number of labels"]
    for kind in ("web", "syn"):
        mine = [label for label in judged if label.source == kind]
        if not mine:
            continue
        lines.append(f"{kind}: {len(mine)} labels, {sum(label.match for label in mine)} match")
        for t in _STEPS:
            kept = [label for label in mine if label.score >= t]
            if kept:
                share, low, high = weighted_share(kept)
                recall = sum(x.weight for x in kept if x.match) / (sum(x.weight for x in mine if x.match) or 1)
                lines.append(f"  at {t:<5g} precision {share:.1%} ({low:.1%} to {high:.1%}), recall {recall:.1%}, "
                             f"{sum(x.weight for x in kept):,.0f} texts kept")  # fmt: skip
        lines.append(_advice(mine, target))
    return lines


def _advice(labels: Sequence[Label], target: float) -> str:
    """Choose a threshold on one half of the labels and estimate its precision on the other."""
    first = [label for label in labels if int(label.id[-1], 16) % 2]
    second = [label for label in labels if not int(label.id[-1], 16) % 2]
    for t in sorted({label.score for label in first}):
        if weighted_share([x for x in first if x.score >= t])[1] >= target:
            kept = [x for x in second if x.score >= t]
            if not kept:
                break
            share, low, high = weighted_share(kept)
            return (f"  {t:.3f}, chosen on half of the labels for a lower end of {target:g}; the other half says "
                    f"precision {share:.1%} ({low:.1%} to {high:.1%})")  # fmt: skip
    return f"  no threshold has a lower end of {target:g} with so few labels"


def read_labels(path: Path) -> list[Label]:
    """Read the filled-in rows of a sheet. ValueError names an invalid row, DataError a line that is not CSV."""
    judged = []
    for number, row in csv_rows(path):
        if not set(_COLUMNS) <= row.keys():
            raise ValueError(f"{path} has not the columns {', '.join(_COLUMNS)}: is it the sheet that audit wrote?")
        answer = row["match"].strip().lower()
        if not answer:
            continue
        if answer not in ("y", "yes", "1", "n", "no", "0"):
            raise ValueError(f"{path}, line {number}: match must be y or n, got {row['match']!r}")
        try:
            score, weight = float(row["score"]), float(row["weight"])
        except ValueError:
            raise ValueError(f"{path}, line {number}: score and weight must be numbers") from None
        judged.append(Label(row["id"], row["source"], score, weight, answer in ("y", "yes", "1")))
    if not judged:
        raise ValueError(f"{path}: no row has y or n in the column match")
    return judged


def weighted_share(labels: Sequence[Label]) -> tuple[float, float, float]:
    """Return the weighted share of matches with its confidence interval."""
    weights = np.array([label.weight for label in labels])
    share = float((weights * [label.match for label in labels]).sum() / weights.sum())
    return share, *wilson(share, float(weights.sum() ** 2 / (weights**2).sum()))


def wilson(share: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95% Wilson interval of a share of n."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
