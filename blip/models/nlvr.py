"""Reasoning over several images: is a sentence true of a pair of images (paper, section 5.4)?

A layer has a cross-attention for each image and merges their results: by their mean in the first half of the layers,
by a linear map of all in the second. B examples, K images of an example, P image
tokens, T text tokens, N packed tokens, D text width, V vision width, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.models import inherit
from blip.models.blip import Blip, Matcher
from blip.models.inherit import WeightOrigin
from blip.models.protocols import Matches, require
from blip.models.settings import NlvrModelConfig
from blip.nn.context import Context, project
from blip.nn.linear import Linear
from blip.nn.packing import Layout
from blip.nn.settings import TextConfig, TrainingOptions
from blip.nn.stack import Block, CrossAttention, Stack
from blip.nn.text import TextPass, TextTransformer
from blip.nn.vision import VisionEncoder


class SeveralCross(nn.Module):
    """K cross-attentions in place of one, each to its own image, with merged results."""

    def __init__(
        self, config: TextConfig, options: TrainingOptions, context_width: int, images: int, merges: bool
    ) -> None:
        super().__init__()
        self.of_image = nn.ModuleList(CrossAttention(config, options, context_width) for _ in range(images))
        if merges:
            self.merge = Linear(images * config.width, config.width)
        self.merges = merges

    def forward(
        self, x: Tensor, layouts: Sequence[Layout], contexts: Sequence[Sequence[Context]], layer: int
    ) -> Tensor:
        """Joined tokens (N, D), each layout with K contexts -> (N, D)."""
        of_image = zip(self.of_image, zip(*contexts, strict=True), strict=True)
        results = [cross(x, layouts, images, layer) for cross, images in of_image]
        return self.merge(torch.cat(results, -1)) if self.merges else torch.stack(results).mean(0)


class Nlvr(nn.Module):
    """An image encoder, a text encoder over several images, and a head that classifies false and true."""

    def __init__(self, config: NlvrModelConfig, options: TrainingOptions = TrainingOptions()) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.vision = VisionEncoder(config.vision, options)
        half = config.text.layers // 2
        cross = [
            SeveralCross(config.text, options, self.vision.width, config.images, merges=layer >= half)
            for layer in range(config.text.layers)
        ]
        blocks = Stack(Block(config.text, options, ("text",), one) for one in cross)
        self.med = TextTransformer(config.text, options, blocks)
        width = config.text.width
        self.head_dense, self.head = Linear(width, width), Linear(width, 2)

    @classmethod
    def from_blip(cls, blip: Blip | Matcher, images: int = 2) -> Self:
        """Build a model with the weights of a pre-trained one, as `origin` says; new weights are random."""
        require(blip, Matches)
        model = cls(NlvrModelConfig.of(blip.config, images=images), blip.options)
        inherit.copy(model, blip, model.origin())
        return model.train(blip.training)

    def origin(self) -> WeightOrigin:
        """Sources of initial weights: every image's cross-attention is a copy of the pre-trained one."""
        copied = inherit.under("vision", self.vision.state_dict(), "vision")
        fresh = dict.fromkeys(inherit.linear("head_dense", "head"), "not pre-trained")
        for name in self.med.state_dict():
            if ".cross.merge." in name:
                fresh[f"med.{name}"] = "pre-training has one image and nothing to merge"
            else:
                block, _, part = name.partition(".cross.of_image.")
                copied[f"med.{name}"] = f"med.{block}.cross.{part.split('.', 1)[1]}" if part else f"med.{name}"
        unused = inherit.not_contrasted() | inherit.not_generated(self.config.text.layers)
        unused |= dict.fromkeys(inherit.linear("match_head"), "has another head")
        return WeightOrigin(copied, fresh, unused)

    def contexts(self, image: Tensor, queries: int | None = None) -> list[Context]:
        """Examples of K images each (B, K, 3, S, S) -> for each of the K the context of sentences.

        `queries` as in `Stack.context`. ValueError unless K is `config.images`.
        """
        count = self.config.images
        if image.dim() != 5 or image.shape[1] != count:
            raise ValueError(f"the images are {list(image.shape)}, the model takes (B, {count}, 3, S, S)")
        tokens = self.vision(image.flatten(0, 1)).unflatten(0, (-1, count))
        maps = [[block.cross.of_image[k].kv for block in self.med.blocks] for k in range(count)]
        return [project(maps[k], tokens[:, k], self.config.text.heads, queries=queries) for k in range(count)]

    def judge(self, ids: Tensor, keep: Tensor, images: Sequence[Context]) -> Tensor:
        """Classify sentences (B, T) that start with [ENC], each about its own images -> logits (B, 2): false, true."""
        (states,) = self.med([TextPass(ids, keep, context=images, first=True)])
        return self.head(F.relu(self.head_dense(states)))
