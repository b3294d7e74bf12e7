"""Protocols: what a model can do, whatever its class.

B images, R rows of text, P image tokens, T text tokens, V vision width, D text width, E embedding width.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from blip.nn.context import Context
from blip.nn.text import TextTransformer


@runtime_checkable
class Embeds(Protocol):
    """Embeds images and texts in one space."""

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, P, V) -> embeddings (B, E) of length 1."""

    def embed_text(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Texts (R, T) that start with [CLS] -> embeddings (R, E) of length 1."""


@runtime_checkable
class Matches(Protocol):
    """Matches texts with images by an image-grounded encoder."""

    def context(self, tokens: Tensor, queries: int | None = None) -> Context:
        """Project image tokens (B, P, V) once for all texts; `queries` as in `Stack.context`."""

    def ground(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [ENC] -> the states (R, D) of [ENC]."""

    def match(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [ENC] -> logits (R, 2): no match, match."""


@runtime_checkable
class Generates(Protocol):
    """Generates texts over a context."""

    @property
    def decoder(self) -> TextTransformer:
        """The transformer with a head that predicts words."""


_REMEDIES: dict[type, str] = {
    Embeds: "compare texts with images: give a pre-training, retrieval or matching checkpoint",
    Matches: "compare texts with images: give a pre-training, retrieval or matching checkpoint",
    Generates: "generate texts: give a captioning or pre-training checkpoint",
}


def require(model: Any, *uses: type) -> None:
    """Raise ValueError, with what to load instead, if a model lacks one of the uses (protocols of this file)."""
    for use in uses:
        if not isinstance(model, use):
            raise ValueError(f"this model is a {type(model).__name__} and cannot {_REMEDIES[use]}")
