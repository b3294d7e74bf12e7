"""What is compared in contrastive learning, and how. N queries, C keys, E embedding width, P tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Embedded(NamedTuple):
    """One modality of some examples in the joint space; their tokens, too, for a similarity that compares tokens."""

    vector: Tensor
    """(N, E) of length 1."""
    tokens: Tensor | None = None
    """(N, P, E) of length 1."""
    mask: Tensor | None = None
    """(N, P) bool: False at padding."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Embedded:
        """`change` applied to each part that is there."""
        return Embedded(*(None if part is None else change(part) for part in self))

    def above(self, other: Embedded) -> Embedded:
        """The rows of both, these first."""
        return Embedded(*(None if a is None else torch.cat([a, b]) for a, b in zip(self, other, strict=True)))


class EmbeddedPair(NamedTuple):
    """Images and texts of a batch of pairs, row by row."""

    image: Embedded
    text: Embedded


class Similarity(Protocol):
    """How well queries and keys go together."""

    def __call__(self, query: Embedded, key: Embedded) -> Tensor:
        """N queries and C keys -> (N, C), higher for more similar ones."""


def cosine(query: Embedded, key: Embedded) -> Tensor:
    """Cosines of the vectors (CLIP, ALBEF, BLIP)."""
    return query.vector @ key.vector.T
