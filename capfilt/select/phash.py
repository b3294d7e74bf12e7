"""Perceptual hashes compared: images whose hashes differ in few bits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from blip.data.phash import BITS

MOST = 6
"""Most differing bits at which images may still count as copies; more takes too long on millions of images."""
_BLOCK = 1 << 18
"""Pairs compared at once."""


def numbers(hashes: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Convert hashes in hex to (N,) uint64, and (N,) bool that says where there is one."""
    there = np.array([h is not None for h in hashes], dtype=bool)
    return np.array([int(h, 16) if h else 0 for h in hashes], dtype=np.uint64), there


def later_ones(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Mark those of (N,) uint64 that are at most `bits` apart from an earlier one: (N,) bool."""
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    later = first[which] != np.arange(len(hashes))
    order = np.sort(first)  # each different hash once, where it is seen first
    near = np.zeros(len(hashes), dtype=bool)
    near[order] = _near(hashes[order], hashes[order], bits, earlier=True)
    return later | near[first[which]]


def near_any(hashes: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """Mark those of (N,) uint64 that are at most `bits` apart from one of (M,) others: (N,) bool."""
    return _near(hashes, others, bits, earlier=False)


def _near(hashes: np.ndarray, others: np.ndarray, bits: int, *, earlier: bool) -> np.ndarray:
    """Hashes that are `bits` apart agree in one of `bits + 1` bands, so only those that do are compared.

    With `earlier`, only others with a smaller number count.
    """
    near = np.zeros(len(hashes), dtype=bool)
    edges = np.linspace(0, BITS, bits + 2).astype(np.uint64)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        bands, of_others = (hashes >> np.uint64(low)) & mask, (others >> np.uint64(low)) & mask
        place = np.argsort(of_others, kind="stable")
        left = np.flatnonzero(~near)
        left = left[np.argsort(bands[left], kind="stable")]
        values, starts = np.unique(bands[left], return_index=True)
        ends = np.append(starts[1:], len(left))
        froms, tos = (np.searchsorted(of_others[place], values, side) for side in ("left", "right"))
        for group in np.flatnonzero(tos - froms > earlier):  # one that is alone has no earlier one
            members = place[froms[group] : tos[group]]
            _compare(hashes, others, left[starts[group] : ends[group]], members, bits, earlier, near)
    return near


def _compare(hashes: np.ndarray, others: np.ndarray, mine: np.ndarray, members: np.ndarray, bits: int, earlier: bool,
             near: np.ndarray) -> None:  # fmt: skip
    """Mark which of `mine` are near one of `members`, some at a time."""
    step = max(1, _BLOCK // len(members))
    for at in range(0, len(mine), step):
        some = mine[at : at + step]
        them = members[: np.searchsorted(members, some[-1])] if earlier else members
        close = np.bitwise_count(hashes[some, None] ^ others[them]) <= bits
        if earlier:
            close &= them < some[:, None]
        near[some] |= close.any(1)
