"""What a selection would keep at other thresholds: the steps of the report's slider, without selecting again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from capfilt.select.policies import SelectConfig, Texts, choose

STEPS = 200
"""Steps between thresholds of 0 and 1."""
_NEVER = -1


class Range(NamedTuple):
    """Thresholds, as indices into `thresholds`, that keep a text: those above `above`, up to `upto`; each (N,)."""

    above: np.ndarray
    upto: np.ndarray


def thresholds(config: SelectConfig) -> list[float] | None:
    """Values of `itm` in ascending order, the selection's own among them; None if it has no one threshold to move."""
    is_moved = config.itm_web is None or config.itm_syn is None
    if config.column != "itm" or config.policy not in ("blip", "web-else-syn") or not is_moved:
        return None
    return sorted({*(step / STEPS for step in range(STEPS + 1)), config.itm})


def ranges(chosen: pa.Table, config: SelectConfig, steps: list[float]) -> Range | None:
    """Thresholds that keep each text of a part; None if something other than a threshold decides about them too."""
    n, last = len(chosen), len(steps) - 1
    row = chosen["row"].to_numpy()
    score = chosen["score"].to_numpy(zero_copy_only=False).astype(np.float64)
    source = np.asarray(chosen["text_source"].to_pylist(), dtype=object)
    is_open = np.isin(chosen["reason"].to_pylist(), _reasons(config))
    kept = chosen["kept"].to_numpy()
    above, upto = np.full(n, _NEVER), np.where(kept & ~is_open, last, _NEVER)
    for name, own in (("web", config.itm_web), ("syn", config.itm_syn)):
        mine = is_open & (source == name)
        reached = np.searchsorted(steps, score[mine], side="right") - 1
        upto[mine] = reached if own is None else np.where(score[mine] >= own, last, _NEVER)
    if config.policy == "web-else-syn" and n:
        web, syn = is_open & (source == "web"), is_open & (source == "syn")
        passed = np.full(int(row.max()) + 1, _NEVER)
        np.maximum.at(passed, row[web], upto[web])
        above[syn] = passed[row[syn]]
        upto[syn & (chosen["rank"].to_numpy(zero_copy_only=False) != _best_ranks(chosen, row, syn))] = _NEVER
    now = steps.index(config.itm)
    is_followed = np.array_equal((above < now) & (now <= upto), kept)
    return Range(above, upto) if is_followed else None


def counts(spans: Range, mine: np.ndarray, steps: int) -> np.ndarray:
    """Number of the texts `mine` that each of the thresholds keeps."""
    some = mine & (spans.upto > spans.above)
    changes = np.bincount(spans.above[some] + 1, minlength=steps + 1)[: steps + 1].astype(np.int64)
    changes -= np.bincount(spans.upto[some] + 1, minlength=steps + 1)[: steps + 1]
    return changes.cumsum()[:steps]


def _reasons(config: SelectConfig) -> list[str]:
    """Reasons that the policy gives; others exclude a text whatever its score."""
    nothing = np.zeros(0, dtype=np.int64)
    return choose(Texts(nothing, nothing, nothing.astype(np.float32)), config, None).reasons


def _best_ranks(chosen: pa.Table, row: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Smallest rank of the texts `mine` in the row of each text."""
    rank = np.where(mine, np.nan_to_num(chosen["rank"].to_numpy(zero_copy_only=False), nan=1e9), 1e9)
    best = np.full(int(row.max()) + 1, 1e9)
    np.minimum.at(best, row, rank)
    return best[row]
