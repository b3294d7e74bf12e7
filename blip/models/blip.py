"""Blip: the image encoder and the text transformer with their projections and the matching head (paper, figure 2).

No loss, no tokenizer, no files, no device. B batch, R rows of text, P image tokens, T text tokens, V vision width,
D text width, E embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.models.settings import BlipConfig
from blip.nn.linear import Linear
from blip.nn.stack import Context, Med, Pass
from blip.nn.vision import VisionEncoder


class Towers(nn.Module):
    """The two unimodal encoders with their projections into the joint space: all that contrast needs."""

    def __init__(self, config: BlipConfig, grounded: bool = False) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.med = Med(config.text, self.vision.width if grounded else None, config.encodes, config.writes)
        if config.encodes:
            self.image_proj = Linear(self.vision.width, config.embed_dim)
            self.text_proj = Linear(config.text.width, config.embed_dim)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, P, V) from `vision` -> joint embeddings (B, E) of length 1, from the class token."""
        self.config.require(encodes=True)
        return F.normalize(self.image_proj(tokens[:, 0]).float(), dim=-1)

    def embed_text(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Texts (R, T) that start with [CLS] -> joint embeddings (R, E) of length 1, from the first token."""
        self.config.require(encodes=True)
        (states,) = self.med([Pass(ids, keep, first=True)])
        return F.normalize(self.text_proj(states).float(), dim=-1)


class Blip(Towers):
    """One image encoder and one text transformer that embeds, matches and writes.

    One that was made of a captioner's or a matching model's checkpoint has only the parts of that (`BlipConfig.parts`),
    so that nothing in it is random. ValueError for a use of what it does not have.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config, grounded=True)
        if config.encodes:
            self.match_head = Linear(config.text.width, 2)
            self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def context(self, tokens: Tensor) -> Context:
        """Image tokens (B, P, V) -> what texts look at, projected once."""
        return self.med.context(tokens)

    def match(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [ENC], looking at `context` -> logits (R, 2): no match, match."""
        self.config.require(encodes=True)
        (states,) = self.med([Pass(ids, keep, context=context, first=True)])
        return self.match_head(states)

    def caption_logits(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Texts (R, T) that start with [DEC] -> logits (R, T, vocabulary) of each next token; zero at padding."""
        self.config.require(writes=True)
        one = Pass(ids, keep, causal=True, context=context)
        (states,) = self.med([one])
        return one.layout.unpack(self.med.vocabulary(states)) * keep[..., None]


def starting_with(ids: Tensor, token: int) -> Tensor:
    """A copy of ids (R, T) with `token` in place of the first one."""
    ids = ids.clone()
    ids[:, 0] = token
    return ids
