"""Visual dialogue: rank answers to a question, given an image, its caption and the history (paper, section 5.5).

The image's tokens and the caption's states stand side by side as one context, projected once for all rounds of a
dialogue and all candidate answers. The dialogue encoder takes question, answer and history: true or false?
B dialogues, R rows of text, P image tokens, T text tokens, D text width, V vision width, S image side in pixels.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from blip.models import inherit
from blip.models.blip import Blip, Matcher, med, starting_with
from blip.models.inherit import WeightOrigin
from blip.models.protocols import Matches, require
from blip.models.settings import DialogueModelConfig
from blip.nn.context import Context
from blip.nn.linear import Linear
from blip.nn.settings import TrainingOptions
from blip.nn.text import TextPass
from blip.nn.vision import VisionEncoder


class Dialogue(nn.Module):
    """An image encoder, and a text encoder for the caption and then the dialogue, whose head matches answers."""

    def __init__(self, config: DialogueModelConfig, options: TrainingOptions = TrainingOptions()) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.vision = VisionEncoder(config.vision, options)
        self.med = med(config.text, options, ("text",), self.vision.width)
        self.match_head = Linear(config.text.width, 2)
        if self.vision.width != config.text.width:
            self.caption_proj = Linear(config.text.width, self.vision.width)

    @classmethod
    def from_blip(cls, blip: Blip | Matcher, caption_sees_image: bool = False) -> Self:
        """Build a model with the weights of a pre-trained one, as `origin` says; new weights are random."""
        require(blip, Matches)
        model = cls(DialogueModelConfig.of(blip.config, caption_sees_image), blip.options)
        inherit.copy(model, blip, model.origin())
        return model.train(blip.training)

    def origin(self) -> WeightOrigin:
        """Sources of initial weights; only `caption_proj`, for images and texts of different widths, is new."""
        fresh = {name: "brings captions to the width of images" for name in self.state_dict() if "caption_proj" in name}
        copied = {name: name for name in self.state_dict() if name not in fresh}
        unused = inherit.not_contrasted() | inherit.not_generated(self.config.text.layers)
        return WeightOrigin(copied, fresh, unused)

    def context(self, image: Tensor, caption_ids: Tensor, caption_keep: Tensor, queries: int | None = None) -> Context:
        """Images (B, 3, S, S) with captions (B, T) that start with [CLS] -> the context of dialogues.

        `queries` as in `Stack.context`.
        """
        tokens = self.vision(image)
        if self.config.caption_sees_image:
            ids = starting_with(caption_ids, self.config.text.enc_id)
            one = TextPass(ids, caption_keep, context=self.med.context(tokens, queries=ids.shape[1]))
        else:
            one = TextPass(caption_ids, caption_keep)
        (states,) = self.med([one])
        states = one.layout.unpack(states)
        if tokens.shape[2] != states.shape[2]:
            states = self.caption_proj(states)
        keep = torch.cat([caption_keep.new_ones(tokens.shape[:2]), caption_keep], 1)
        return self.med.context(torch.cat([tokens, states], 1), keep, queries)

    def match(self, ids: Tensor, keep: Tensor, context: Context) -> Tensor:
        """Question, answer and history (R, T), starting with [ENC] -> logits (R, 2): false, true."""
        (states,) = self.med([TextPass(ids, keep, context=context, first=True)])
        return self.match_head(states)
