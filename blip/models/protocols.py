"""What a model can be asked for, whatever its class.

B images, R rows of text, P image tokens, T text tokens, V vision width, D text width, E embedding width.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from blip.nn.context import Context
from blip.nn.text import TextTransformer


@runtime_checkable
class Embeds(Protocol):
    """Images and texts become vectors of one space."""

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, P, V) -> embeddings (B, E) of length 1."""

    def embed_text(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Texts (R, T) that start with [CLS] -> embeddings (R, E) of length 1."""


@runtime_checkable
class Matches(Protocol):
    """Texts are compared with images, over the image."""

    def context(self, tokens: Tensor, queries: int | None = None) -> Context:
        """Image tokens (B, P, V), projected once; `queries` as of `Stack.context`."""

    def ground(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [ENC] -> the states (R, D) by which they are compared."""

    def match(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [ENC] -> logits (R, 2): no match, match."""


@runtime_checkable
class Generates(Protocol):
    """Texts are generated over a context."""

    @property
    def decoder(self) -> TextTransformer:
        """The transformer with a head that predicts words."""


_REMEDIES: dict[type, str] = {
    Embeds: "compare texts with images: give a pre-training, retrieval or matching checkpoint",
    Matches: "compare texts with images: give a pre-training, retrieval or matching checkpoint",
    Generates: "generate texts: give a captioning or pre-training checkpoint",
}


def require(model: Any, *uses: type) -> None:
    """ValueError, saying what to load instead, if a model lacks one of the uses, which are protocols of this file."""
    for use in uses:
        if not isinstance(model, use):
            raise ValueError(f"this model is a {type(model).__name__} and cannot {_REMEDIES[use]}")
