"""Blip: the image encoder and the text transformer with their projections and the matching head (paper, figure 2).

No loss, no tokenizer, no files, no device. B batch, R rows of text, P image tokens, T text tokens, V vision width,
D text width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.models.settings import BlipConfig
from blip.nn.context import Context
from blip.nn.linear import Linear
from blip.nn.settings import TextConfig, TrainingOptions
from blip.nn.stack import Block, CrossAttention, Stack
from blip.nn.text import TextPass, TextTransformer
from blip.nn.vision import VisionEncoder


def med(
    config: TextConfig, options: TrainingOptions, attentions: Sequence[str], context_width: int | None = None
) -> TextTransformer:
    """Build the multimodal mixture of encoder and decoder (paper, section 3.1), or only the parts that are needed.

    A layer has a self-attention for each of `attentions`, `text` (encoder) and `causal` (decoder), and shares the rest.
    """

    def block() -> Block:
        cross = None if context_width is None else CrossAttention(config, options, context_width)
        return Block(config, options, attentions, cross)

    return TextTransformer(config, options, Stack(block() for _ in range(config.layers)), head="causal" in attentions)


class Towers(nn.Module):
    """The two unimodal encoders with their projections into the joint space: all that contrast needs."""

    def __init__(
        self,
        config: BlipConfig,
        options: TrainingOptions = TrainingOptions(),
        attentions: Sequence[str] = ("text",),
        grounded: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.vision = VisionEncoder(config.vision, options)
        self.med = med(config.text, options, attentions, self.vision.width if grounded else None)
        self.image_proj = Linear(self.vision.width, config.embed_dim)
        self.text_proj = Linear(config.text.width, config.embed_dim)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, P, V) from `vision` -> joint embeddings (B, E) of length 1, from the class token."""
        return F.normalize(self.image_proj(tokens[:, 0]).float(), dim=-1)

    def embed_text(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Texts (R, T) that start with [CLS] -> joint embeddings (R, E) of length 1, from the first token."""
        (states,) = self.med([TextPass(ids, keep, first=True)])
        return F.normalize(self.text_proj(states).float(), dim=-1)


class Matcher(Towers):
    """The towers and the image-grounded text encoder: what a retrieval or matching checkpoint has."""

    def __init__(
        self, config: BlipConfig, options: TrainingOptions = TrainingOptions(), attentions: Sequence[str] = ("text",)
    ) -> None:
        super().__init__(config, options, attentions, grounded=True)
        self.match_head = Linear(config.text.width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def context(self, tokens: Tensor, queries: int | None = None) -> Context:
        """Project image tokens (B, P, V) once for all texts; `queries` as in `Stack.context`."""
        return self.med.context(tokens, queries=queries)

    def ground(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [ENC], over `context` -> the states (R, D) of [ENC]."""
        (states,) = self.med([TextPass(ids, keep, context=context, first=True)])
        return states

    def match(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [ENC], over `context` -> logits (R, 2): no match, match."""
        return self.match_head(self.ground(ids, keep, context))


class Captioner(nn.Module):
    """The image encoder and the image-grounded text decoder: what a captioner's checkpoint has."""

    def __init__(self, config: BlipConfig, options: TrainingOptions = TrainingOptions()) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.vision = VisionEncoder(config.vision, options)
        self.med = med(config.text, options, ("causal",), self.vision.width)

    def context(self, tokens: Tensor, queries: int | None = None) -> Context:
        """Project image tokens (B, P, V) once for all texts; `queries` as in `Stack.context`."""
        return self.med.context(tokens, queries=queries)

    @property
    def decoder(self) -> TextTransformer:
        """The text transformer, whose head predicts words."""
        return self.med

    def caption_logits(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [DEC] -> logits (R, T, vocabulary) of each next token; zero at padding."""
        one = TextPass(ids, keep, causal=True, context=context)
        (states,) = self.med([one])
        return one.layout.unpack(self.med.vocabulary(states)) * keep[..., None]


class Blip(Matcher):
    """One image encoder and one text transformer that embeds, matches and generates."""

    def __init__(self, config: BlipConfig, options: TrainingOptions = TrainingOptions()) -> None:
        super().__init__(config, options, ("text", "causal"))

    decoder = Captioner.decoder
    caption_logits = Captioner.caption_logits


def starting_with(ids: Tensor, token: int) -> Tensor:
    """Copy ids (R, T) with `token` in the first column."""
    ids = ids.clone()
    ids[:, 0] = token
    return ids
