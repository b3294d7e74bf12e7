"""The slow teacher and the queues of its features (paper, section 3.2, after MoCo and ALBEF).

M rows pushed, Q queue, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.models.blip import Towers


class Teacher(nn.Module):
    """An exponential moving average of a student's two towers; never trained, never saved with the model."""

    def __init__(self, student: Towers) -> None:
        super().__init__()
        self.towers = Towers(student.config).requires_grad_(False)
        self.update(student, momentum=0.0)

    @torch.no_grad()
    def update(self, student: Towers, momentum: float) -> None:
        """Move every parameter: teacher = momentum * teacher + (1 - momentum) * student."""
        source = dict(student.named_parameters())
        mine, theirs = zip(*((p, source[name]) for name, p in self.towers.named_parameters()), strict=True)
        torch._foreach_lerp_(list(mine), list(theirs), 1 - momentum)


class _Ring(nn.Module):
    """The last Q rows that were pushed, a ring of any size; what it began with until it is full."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Overwrite the oldest with features (M, ...); of more than Q, the last Q remain."""
        size = len(self.features)
        if size == 0:
            return
        features = features[-size:]
        index = (self.next + torch.arange(len(features), device=features.device)) % size
        self.features.index_copy_(0, index, features.to(self.features.dtype))
        self.next.copy_((self.next + len(features)) % size)


class Queue(_Ring):
    """The last Q features (Q, E) of one modality; random directions until it is full."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(F.normalize(torch.randn(size, width), dim=1))


class IdQueue(_Ring):
    """The image ids (Q,) of what feature queues of the same size hold; -100, no image's, until it is full."""

    def __init__(self, size: int) -> None:
        super().__init__(torch.full((size,), -100))
