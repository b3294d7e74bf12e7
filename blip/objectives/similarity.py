"""Embeddings for contrastive learning, and their similarity. N queries, C keys, E embedding width, P tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Embedded(NamedTuple):
    """Examples of one modality in the joint space, with their tokens for a similarity that compares tokens."""

    vector: Tensor
    """(N, E) embeddings of length 1."""
    tokens: Tensor | None = None
    """(N, P, E) token embeddings of length 1."""
    mask: Tensor | None = None
    """(N, P) bool: False at padding."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Embedded:
        """Apply `change` to each part that is not None."""
        return Embedded(*(None if part is None else change(part) for part in self))

    def above(self, other: Embedded) -> Embedded:
        """Concatenate the rows of both, own rows first."""
        return Embedded(*(None if a is None else torch.cat([a, b]) for a, b in zip(self, other, strict=True)))


class EmbeddedPair(NamedTuple):
    """Embedded images and texts of a batch of pairs, row by row."""

    image: Embedded
    text: Embedded


class Similarity(Protocol):
    """A similarity of queries and keys."""

    def __call__(self, query: Embedded, key: Embedded) -> Tensor:
        """N queries and C keys -> (N, C), higher for more similar ones."""


def cosine(query: Embedded, key: Embedded) -> Tensor:
    """Cosines of the vectors (CLIP, ALBEF, BLIP)."""
    return query.vector @ key.vector.T
