"""Visual dialogue: is this the answer to the question, given the image, its caption and what was said (section 5.5)?

The image's tokens and the caption's states stand side by side as one context, projected once for all rounds of a
dialogue and all candidate answers. The dialogue encoder reads question, answer and history, and tells true from false.
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
from blip.nn.text import TextPass
from blip.nn.vision import VisionEncoder


class Dialogue(nn.Module):
    """An image encoder, and a text encoder that reads the caption and then the dialogue; its head matches answers."""

    def __init__(self, config: DialogueModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.med = med(config.text, ("text",), self.vision.width)
        self.match_head = Linear(config.text.width, 2)
        if self.vision.width != config.text.width:
            self.caption_proj = Linear(config.text.width, self.vision.width)

    @classmethod
    def from_blip(cls, blip: Blip | Matcher, caption_sees_image: bool = False) -> Self:
        """A model that starts from a pre-trained one by `origin`; what is new there is random."""
        require(blip, Matches)
        model = cls(DialogueModelConfig.of(blip.config, caption_sees_image))
        inherit.copy(model, blip, model.origin())
        return model.train(blip.training)

    def origin(self) -> WeightOrigin:
        """Where first weights come from; only where images and texts differ in width something is new."""
        fresh = {name: "brings captions to the width of images" for name in self.state_dict() if "caption_proj" in name}
        copied = {name: name for name in self.state_dict() if name not in fresh}
        heads = [f"{name}.{kind}" for name in ("image_proj", "text_proj") for kind in ("weight", "bias")]
        left = dict.fromkeys(["temperature", *heads], "nothing is contrasted")
        left |= dict.fromkeys(inherit.generating(self.config.text.layers), "nothing is generated")
        return WeightOrigin(copied, fresh, left)

    def context(self, image: Tensor, caption_ids: Tensor, caption_keep: Tensor, queries: int | None = None) -> Context:
        """Images (B, 3, S, S) with captions (B, T) that start with [CLS] -> what the rows of dialogues attend to.

        `queries` as of `Stack.context`.
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
        """Questions with an answer and what was said (R, T), starting with [ENC] -> logits (R, 2): false, true."""
        (states,) = self.med([TextPass(ids, keep, context=context, first=True)])
        return self.match_head(states)
