"""Caption metrics on tokens, each from sums over images, so that images can be resampled.

BLEU, CIDEr and ROUGE-L are pycocoevalcap's. N images, C columns that are summed, W draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
_CELLS = 4_000_000
"""Most weights of drawn images held at a time."""
_ORDERS = 4


class Metric(NamedTuple):
    """Scores that are a function of sums over images."""

    names: tuple[str, ...]
    rows: np.ndarray
    """Statistics (N, C) of each image."""
    of_sums: Callable[[np.ndarray, int], np.ndarray]
    """Sums (..., C) over n images, and n -> scores (..., len(names))."""


def mean(name: str, scores: np.ndarray) -> Metric:
    """The mean of a score (N,) of each image."""
    return Metric((name,), np.asarray(scores, np.float64)[:, None], lambda sums, n: sums / n)


def bleu(references: Sequence[Sequence[str]], captions: Sequence[str]) -> Metric:
    """BLEU-1 to BLEU-4 of all captions together, each against the reference of the closest length."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=_ORDERS)
    for texts, caption in zip(references, captions, strict=True):
        scorer += (caption, texts)
    rows = [(c["testlen"], _closest(c["reflen"], c["testlen"]), *c["correct"], *c["guess"]) for c in scorer.ctest]
    return Metric(tuple(f"bleu_{n}" for n in range(1, _ORDERS + 1)), np.array(rows, np.float64), _bleu)


def _closest(lengths: Sequence[int], length: int) -> int:
    """The reference length closest to a caption's; the shorter of two equally close ones."""
    return min(lengths, key=lambda one: (abs(one - length), one))


def _bleu(sums: np.ndarray, _: int) -> np.ndarray:
    small, tiny = 1e-9, 1e-15  # pycocoevalcap's, which keep 0/0 at 0
    length, wanted = sums[..., 0], sums[..., 1]
    precisions = (sums[..., 2 : 2 + _ORDERS] + tiny) / (sums[..., 2 + _ORDERS :] + small)
    scores = np.cumprod(precisions, -1) ** (1 / np.arange(1, _ORDERS + 1))
    ratio = (length + tiny) / (wanted + small)
    return scores * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]


def cider(references: Sequence[Sequence[str]], captions: Sequence[str]) -> np.ndarray:
    """CIDEr-D (N,) of each caption, as pycocoevalcap's Cider; document frequencies are those of the references given.

    A score of 1 is printed as 100 in papers. ValueError if no reference holds a word.
    """
    if not any(text.split() for texts in references for text in texts):
        raise ValueError("no reference caption holds a word, so CIDEr is not defined")
    from pycocoevalcap.cider.cider import Cider

    return np.asarray(Cider().compute_score(*_as_dicts(references, captions))[1])


def rouge_l(references: Sequence[Sequence[str]], captions: Sequence[str]) -> np.ndarray:
    """ROUGE-L (N,) of each caption."""
    from pycocoevalcap.rouge.rouge import Rouge

    return np.asarray(Rouge().compute_score(*_as_dicts(references, captions))[1])


def _as_dicts(references: Sequence[Sequence[str]], captions: Sequence[str]) -> tuple[dict, dict]:
    return dict(enumerate(map(list, references))), {i: [caption] for i, caption in enumerate(captions)}


def summary(metrics: Sequence[Metric], resamples: int = 0, seed: int = 0) -> dict[str, float]:
    """Scores by name; with `resamples` also `name_low` and `name_high`, 95% bootstrap intervals over images.

    All metrics see the same draws. CIDEr's document frequencies stay those of all images.
    """
    count, names = len(metrics[0].rows), [name for metric in metrics for name in metric.names]
    scores = dict(zip(names, _scores(metrics, [metric.rows.sum(0) for metric in metrics], count).tolist(), strict=True))
    if resamples:
        drawn = [
            _scores(metrics, [w @ metric.rows for metric in metrics], count) for w in draws(count, resamples, seed)
        ]
        low, high = np.quantile(np.concatenate(drawn), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), axis=0)
        for name, *ends in zip(names, low.tolist(), high.tolist(), strict=True):
            scores[f"{name}_low"], scores[f"{name}_high"] = ends
    return scores


def _scores(metrics: Sequence[Metric], sums: Sequence[np.ndarray], count: int) -> np.ndarray:
    return np.concatenate([metric.of_sums(s, count) for metric, s in zip(metrics, sums, strict=True)], -1)


def draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `count` images is drawn, in blocks (W, N) float64 of all `resamples` draws.

    A row adds up to `count`.
    """
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // count)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield generator.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
