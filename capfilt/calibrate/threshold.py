"""Calibrate a threshold with a labelled audit, a clean reference set, or shuffled captions."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from capfilt import plan
from capfilt.calibrate import audit
from capfilt.report.counts import BINS, NULL
from capfilt.run import Run
from capfilt.score.annotate import item_of
from capfilt.score.decoding import Decoded
from capfilt.score.dry_run import Silent
from capfilt.score.loop import ScoreOptions, Worker
from capfilt.score.scorer import Item, Matched, Scorer
from capfilt.settings import CalibrateOptions, ReadConfig

_STEPS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
_CANDIDATES = 20
"""Number of other images' captions of which the nearest by cosine is the hard negative."""


def calibrate(run: Run, options: CalibrateOptions, make_scorer: Callable[[Run], Scorer]) -> list[str]:
    """Calibrate by the chosen method; returns lines to print."""
    if options.method == "audit":
        return audit.read(run, options.labels, options.target) if options.labels else audit.write(run, options.count)
    # Only the filter is asked.
    run.config = dataclasses.replace(run.config, captioner=None)
    if options.method == "null":
        return null_floor(run, options, _without_captions(make_scorer))
    return against_reference(run, options, _without_captions(make_scorer))


def _without_captions(make_scorer: Callable[[Run], Scorer]) -> Callable[[Run], Scorer]:
    def make(run: Run) -> Scorer:
        scorer = make_scorer(run)
        if hasattr(scorer, "captions"):
            scorer.captions = 0
        return scorer

    return make


def _decoded(run: Run, worker: Worker, count: int) -> Iterator[list[Decoded]]:
    """Decode rows with image and text, part by part in the order of their ids, until there are enough."""
    seen = 0
    for part in run.in_order():
        tasks, rows = worker.begin(part, 1), []
        while tasks:
            pool, task = tasks.popleft()
            rows += [row for row in pool.take(task) if row.pixels and any(row.norm)]
        yield rows[: count - seen]
        seen += len(rows)
        if seen >= count:
            return


def _matched(worker: Worker, items: Sequence[Item]) -> list[list[Matched]]:
    matches: list[list[Matched]] = []
    for at in range(0, len(items), worker.batch):
        matches += [scores.web if scores else [] for scores in worker.show(items[at : at + worker.batch])]
    return matches


# Null floor -----------------------------------------------------------------------------------------------------------


def null_floor(run: Run, options: CalibrateOptions, make_scorer: Callable[[Run], Scorer]) -> list[str]:
    """Score captions with other images of their shard; writes report/null.json for the report."""
    worker = Worker(run, make_scorer(run), ScoreOptions(decode_workers=options.decode_workers))
    worker.claims = Silent()
    scores: list[float] = []
    for rows in _decoded(run, worker, options.count):
        texts = [next(t for t in row.norm if t is not None) for row in rows]
        others = texts[1:] + texts[:1]
        pairs = [
            Item(item_of(row, "null").sample_id, row.pixels, [other])
            for row, own, other in zip(rows, texts, others, strict=True)
            if own != other
        ]
        scores += [match.probability for matched in _matched(worker, pairs) for match in matched]
    worker.close()
    probabilities = np.array(scores)
    if not len(probabilities):
        raise ValueError(f"{run.where} has no two rows with different texts to shuffle")
    histogram = np.bincount((probabilities * BINS + 1e-4).astype(int), minlength=BINS + 1)
    run.storage.write(NULL, json.dumps({"pairs": len(probabilities), "histogram": histogram.tolist()}).encode())
    lines = [f"{len(probabilities):,} captions with an image that is not theirs:"]
    lines += [f"  P(match) >= {t:g}: {(probabilities >= t).mean():.2%} of them" for t in _STEPS]
    return [
        *lines,
        "This is a floor: near misses pass far more often than shuffled captions. A filter that lets many of them pass "
        "is broken, or the crawl repeats itself; do not choose a threshold by it.",
    ]


# Clean reference ------------------------------------------------------------------------------------------------------


def against_reference(run: Run, options: CalibrateOptions, make_scorer: Callable[[Run], Scorer]) -> list[str]:
    """Compare human captions with negatives: random captions of other images, and hard ones by cosine."""
    with tempfile.TemporaryDirectory() as folder:
        reading = ReadConfig([str(options.reference)])  # its own column names, whatever the crawl's are
        reference = plan.make(folder, run.config, reading, 64)
        worker = Worker(reference, make_scorer(run), ScoreOptions(decode_workers=options.decode_workers))
        worker.claims = Silent()
        rows = [row for some in _decoded(reference, worker, options.count) for row in some]
        positive, random, hard = reference_scores(rows, worker)
        worker.close()
    lines = [f"{len(rows)} images of {options.reference}, {len(positive)} right pairs"]
    for name, negative in (("random", random), ("hard", hard)):
        lines.append(f"against {name} negatives: ROC AUC {auc(positive, negative):.4f}, "
                     f"calibration error {calibration_error(positive, negative):.3f}")  # fmt: skip
        for t in _STEPS:
            right, wrong = (positive >= t).mean(), (negative >= t).mean()
            precision = right / (right + wrong) if right + wrong else 1.0
            lines.append(f"  at {t:g}: recall {right:.1%}, wrong ones kept {wrong:.1%}, precision if half are right "
                         f"{precision:.1%}")  # fmt: skip
        t = threshold_for(positive, negative, options.target)
        reach = "no threshold reaches" if t is None else f"from {t:.3f} on reaches"
        lines.append(f"  {reach} precision {options.target:g} if half of the pairs are right")
    return lines


def reference_scores(rows: Sequence[Decoded], worker: Worker) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return P(match) of right pairs, of random negatives and of hard negatives."""
    texts = [[t for t in row.norm if t is not None] for row in rows]
    if len(rows) < 3:
        raise ValueError("the reference set has fewer than 3 images with captions")
    dice = np.random.default_rng(0)
    items, right = [], []
    for i, row in enumerate(rows):
        others = [
            j for j in dice.permutation(len(rows))[: _CANDIDATES + 1] if j != i and not set(texts[j]) & set(texts[i])
        ]
        items.append(Item(item_of(row, "reference").sample_id, row.pixels, [*texts[i], *(texts[j][0] for j in others)]))
        right.append(len(texts[i]))
    positive, random, hard = [], [], []
    for matched, n in zip(_matched(worker, items), right, strict=True):
        positive += [m.probability for m in matched[:n]]
        if len(matched) > n:
            random.append(matched[n].probability)
            hard.append(max(matched[n:], key=lambda m: m.itc).probability)
    return np.array(positive), np.array(random), np.array(hard)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a right pair scores above a wrong one; ties count half."""
    order = np.sort(negative)
    below, upto = np.searchsorted(order, positive, "left"), np.searchsorted(order, positive, "right")
    return float(((below + upto) / 2).mean() / len(negative))


def calibration_error(positive: np.ndarray, negative: np.ndarray, bins: int = 10) -> float:
    """Return the mean gap of P(match) and the share of right pairs over bins, both kinds weighted equally."""
    scores = np.concatenate([positive, negative])
    right = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    weight = np.concatenate([np.full(len(positive), 0.5 / len(positive)), np.full(len(negative), 0.5 / len(negative))])
    where = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = (abs((weight * (scores - right))[where == b].sum()) for b in range(bins))
    return float(sum(gaps))


def threshold_for(positive: np.ndarray, negative: np.ndarray, precision: float) -> float | None:
    """Return the lowest threshold that reaches `precision` if half of all pairs are right; None if none does."""
    for t in np.unique(np.concatenate([positive, negative])):
        right, wrong = (positive >= t).mean(), (negative >= t).mean()
        if right and right / (right + wrong) >= precision:
            return float(t)
    return None
