"""Near-duplicates by embedding: images whose cosine with an earlier one reaches a threshold.

N images, E numbers each. Up to `EXACT` images every pair is compared, a block at a time; of more, those of one cluster.
"""

from __future__ import annotations

import numpy as np

from blip.data.near import earliest_near

EXACT = 1_000_000
"""Most images of which every pair is compared."""
_BLOCK = 2048
_SAMPLE, _ROUNDS, _PER_CLUSTER = 65_536, 6, 250_000


def later_ones(embeddings: np.ndarray, cosine: float) -> np.ndarray:
    """Mark those of (N, E) whose cosine with an earlier one is at least `cosine`, whether that is marked or not."""
    later = np.zeros(len(embeddings), dtype=bool)
    if len(embeddings) <= EXACT:
        _compare(embeddings, np.arange(len(embeddings)), np.arange(len(embeddings)), cosine, later)
        return later
    first, second = _clusters(embeddings, -(-len(embeddings) // _PER_CLUSTER))
    for cluster in np.unique(first):  # an image near the border is also compared with those beyond it
        members = np.flatnonzero(first == cluster)
        _compare(embeddings, np.flatnonzero((first == cluster) | (second == cluster)), members, cosine, later)
    return later


def _compare(embeddings: np.ndarray, mine: np.ndarray, members: np.ndarray, cosine: float, later: np.ndarray) -> None:
    """Mark which of `mine` are near an earlier one of `members`; both are numbers of images in ascending order."""
    mine = mine[~later[mine]]
    earliest = earliest_near(embeddings, lambda some, others: _unit(some) @ _unit(others).T >= cosine, mine, members)
    later[mine[earliest < mine]] = True


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _clusters(embeddings: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest and the second nearest of `count` centres for each image, by k-means on evenly spaced ones."""
    sample = _unit(embeddings[np.linspace(0, len(embeddings) - 1, min(_SAMPLE, len(embeddings))).astype(int)])
    centres = sample[np.linspace(0, len(sample) - 1, count).astype(int)]
    for _ in range(_ROUNDS):
        nearest = (sample @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        centres = np.where(np.any(sums, axis=1, keepdims=True), _unit(sums), centres)
    first, second = (np.zeros(len(embeddings), np.int32) for _ in range(2))
    for at in range(0, len(embeddings), _BLOCK):
        order = np.argsort(-(_unit(embeddings[at : at + _BLOCK]) @ centres.T), axis=1, kind="stable")
        first[at : at + _BLOCK], second[at : at + _BLOCK] = order[:, 0], order[:, 1]
    return first, second
