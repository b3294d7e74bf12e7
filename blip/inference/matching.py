"""Matching texts with images: each image is projected once for all texts that are compared with it.

B images, P image tokens, V vision width, M texts, T text tokens, K texts of one image, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip.models.blip import Matcher

_TOGETHER = 16
"""Most images whose keys and values are in memory at once: 42 MB each in BASE at 384 px and float32."""


@torch.no_grad()
def ground(
    model: Matcher, tokens: Tensor, ids: Tensor, keep: Tensor, chosen: Sequence[Tensor], batch: int = 256
) -> list[Tensor]:
    """Image tokens (B, P, V) and texts (M, T) that start with [ENC] -> for each image the [ENC] states (K, D).

    `chosen` says for each image which texts are compared with it, (K,) int64 on the CPU as ids and keep are; K may
    differ and be 0. At most `batch` texts go through the model at once. The states are on the images' device, without
    gradient.
    """
    if len(chosen) != len(tokens):
        raise ValueError(f"texts are chosen for {len(chosen)} images, but there are {len(tokens)}")
    lengths = keep.sum(1)
    results: list[Tensor] = []
    for start, end in _equal_groups([len(rows) for rows in chosen], batch):
        rows, texts_each = torch.cat(list(chosen[start:end])), len(chosen[start])
        if not texts_each:
            results += [tokens.new_empty(0, model.config.text.width)] * (end - start)
            continue
        order = lengths[rows].argsort(stable=True) if end - start == 1 else torch.arange(len(rows))
        queries = texts_each * int(lengths[rows].max())
        context = model.context(tokens[start:end], queries=queries)
        states = []
        for part in rows[order].split(batch if end - start == 1 else len(rows)):
            longest = int(lengths[part].max())
            some = [grid[part, :longest].to(tokens.device, non_blocking=True) for grid in (ids, keep)]
            states.append(model.ground(*some, context.expand(len(part) // (end - start))))
        together = torch.cat(states)[order.argsort().to(tokens.device, non_blocking=True)]
        results += together.split(texts_each)
    return results


def match(
    model: Matcher, tokens: Tensor, ids: Tensor, keep: Tensor, chosen: Sequence[Tensor], batch: int = 256
) -> list[Tensor]:
    """As `ground` -> for each image the logits (K, 2) of no match and match, float32, without gradient."""
    with torch.no_grad():
        return [model.match_head(states).float() for states in ground(model, tokens, ids, keep, chosen, batch)]


def _equal_groups(counts: Sequence[int], batch: int) -> list[tuple[int, int]]:
    """Group neighbouring images with equally many texts, up to `_TOGETHER` images or `batch` texts: [start, end)."""
    groups: list[tuple[int, int]] = []
    for i, count in enumerate(counts):
        start = groups[-1][0] if groups else i
        if groups and counts[start] == count and (i + 1 - start) * count <= batch and i - start < _TOGETHER:
            groups[-1] = (start, i + 1)
        else:
            groups.append((i, i + 1))
    return groups
