"""Near-duplicates: for each of many values the first one before it that is near, compared block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_BLOCK = 2048
"""Values compared at once with as many others."""


def earliest_near(
    values: np.ndarray,
    are_near: Callable[[np.ndarray, np.ndarray], np.ndarray],
    mine: np.ndarray | None = None,
    members: np.ndarray | None = None,
) -> np.ndarray:
    """For each of `mine` the number of the first of `members` before it that is near, or else its own: (N,) int64.

    Both are numbers of `values` in ascending order, all of them if None. `are_near` takes some values and some others
    and returns (some, others) bool. Memory does not grow with their numbers.
    """
    mine, members = (np.arange(len(values)) if chosen is None else chosen for chosen in (mine, members))
    earliest = mine.copy()
    for at in range(0, len(mine), _BLOCK):
        left = np.arange(at, min(at + _BLOCK, len(mine)))
        before = members[: np.searchsorted(members, mine[left[-1]])]
        for start in range(0, len(before), _BLOCK):
            others = before[start : start + _BLOCK]
            near = are_near(values[mine[left]], values[others]) & (others < mine[left, None])
            has = near.any(1)
            earliest[left[has]] = others[near[has].argmax(1)]
            left = left[~has]
            if not len(left):
                break
    return earliest
