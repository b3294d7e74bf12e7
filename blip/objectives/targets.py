"""Targets of contrastive learning: the distribution over candidates that a row should have. B batch, C candidates.

A cross-entropy needs only the expected logit under a target, so a target builds a tensor of size (B, C) only if it
needs one itself.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Target(Protocol):
    """A distribution over the candidates of each row."""

    def __call__(self, logits: Tensor, start: int, teacher: Tensor | None) -> Tensor:
        """Logits (B, C), the column of row 0's partner, the teacher's logits -> expected logits (B,)."""


class OwnPartner:
    """The row's own partner alone (CLIP)."""

    def __call__(self, logits: Tensor, start: int, teacher: Tensor | None) -> Tensor:
        return logits.diagonal(start)


class SameImage:
    """All candidates of the row's image evenly, which `same` (B, C) bool marks (BLIP's retrieval, section 5.1)."""

    def __init__(self, same: Tensor) -> None:
        self.share = same / same.sum(1, keepdim=True)

    def __call__(self, logits: Tensor, start: int, teacher: Tensor | None) -> Tensor:
        return (self.share * logits).sum(1)


class Distilled:
    """`1 - alpha` of another target and `alpha` of the teacher's own softmax, without gradient (ALBEF, BLIP)."""

    def __init__(self, target: Target, alpha: float) -> None:
        self.target, self.alpha = target, alpha

    def __call__(self, logits: Tensor, start: int, teacher: Tensor | None) -> Tensor:
        with torch.no_grad():
            soft = F.softmax(teacher, dim=1).mul_(self.alpha)
        return (1 - self.alpha) * self.target(logits, start, teacher) + (soft * logits).sum(1)
