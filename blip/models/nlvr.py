"""Reasoning over several images: does a sentence hold for a pair of pictures (paper, section 5.4)?

A layer looks at each image with a cross-attention of its own, side by side, and puts what they found together: their
mean in the first half of the layers, a linear map of both in the second. B examples, K images of an example, P image
tokens, T text tokens, N packed tokens, D text width, V vision width, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.models import inherit
from blip.models.blip import Blip
from blip.models.inherit import Origin
from blip.models.settings import NlvrModelConfig
from blip.nn.linear import Linear
from blip.nn.settings import TextConfig
from blip.nn.stack import Context, CrossAttention, Layout, Med, Pass, project
from blip.nn.vision import VisionEncoder


@dataclass(eq=False, repr=False)
class SideBySide:
    """What sentences look at where there are K images: a context for each of them, in their order."""

    parts: Sequence[Context]
    """K contexts of B."""

    def __getitem__(self, index: Tensor) -> Self:
        """The examples at `index` (M,)."""
        return replace(self, parts=[part[index] for part in self.parts])


class SeveralCross(nn.Module):
    """K cross-attentions in the place of one, each with its own image, and what they found put together."""

    def __init__(self, config: TextConfig, context_width: int, images: int, merges: bool) -> None:
        super().__init__()
        self.of_image = nn.ModuleList(CrossAttention(config, context_width) for _ in range(images))
        if merges:
            self.merge = Linear(images * config.width, config.width)
        self.merges = merges

    def forward(self, x: Tensor, layouts: Sequence[Layout], contexts: Sequence[SideBySide], layer: int) -> Tensor:
        """(N, D) -> (N, D)."""
        found = [
            cross(x, layouts, [context.parts[k] for context in contexts], layer)
            for k, cross in enumerate(self.of_image)
        ]
        return self.merge(torch.cat(found, -1)) if self.merges else torch.stack(found).mean(0)


class Nlvr(nn.Module):
    """An image encoder, a text encoder that looks at several images, and a head that says false or true."""

    def __init__(self, config: NlvrModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.med = Med(config.text, self.vision.width, writes=False)
        for layer, block in enumerate(self.med.blocks):
            merges = layer >= config.text.layers // 2
            block.cross = SeveralCross(config.text, self.vision.width, config.images, merges)
            block.cross.apply(self.med.initialise)
        width = config.text.width
        self.head_dense, self.head = Linear(width, width), Linear(width, 2)

    @classmethod
    def from_blip(cls, blip: Blip, images: int = 2) -> Self:
        """A model that starts from a pre-trained one by `origin`; what is new there is random."""
        blip.config.require(encodes=True)
        model = cls(NlvrModelConfig.of(blip.config, images=images))
        inherit.copy(model, blip, model.origin())
        return model.train(blip.training)

    def origin(self) -> Origin:
        """Where first weights come from: every image's cross-attention is a copy of the pre-trained one."""
        copied = inherit.under("vision", self.vision.state_dict(), "vision")
        fresh = dict.fromkeys(("head_dense.weight", "head_dense.bias", "head.weight", "head.bias"), "not pre-trained")
        for name in self.med.state_dict():
            if ".cross.merge." in name:
                fresh[f"med.{name}"] = "pre-training sees one image, so that there is nothing to merge"
            else:
                block, _, part = name.partition(".cross.of_image.")
                copied[f"med.{name}"] = f"med.{block}.cross.{part.split('.', 1)[1]}" if part else f"med.{name}"
        left = dict.fromkeys(("temperature", *_linear("image_proj"), *_linear("text_proj")), "nothing is contrasted")
        left |= dict.fromkeys(_linear("match_head"), "has another head")
        left |= dict.fromkeys(inherit.writing(self.config.text.layers), "nothing is written")
        return Origin(copied, fresh, left)

    def look(self, image: Tensor, queries: int | None = None) -> SideBySide:
        """Examples of K pictures each (B, K, 3, S, S) -> what sentences look at, each picture projected once.

        `queries` is how many text tokens will look at each, where that is known and no gradient is wanted. ValueError
        unless K is what the model was made for.
        """
        count = self.config.images
        if image.dim() != 5 or image.shape[1] != count:
            raise ValueError(f"the pictures are {list(image.shape)}, the model takes (B, {count}, 3, S, S)")
        tokens = self.vision(image.flatten(0, 1)).unflatten(0, (-1, count))
        parts = []
        for k in range(count):
            maps = [block.cross.of_image[k].kv for block in self.med.blocks]
            parts.append(project(maps, tokens[:, k], self.config.text.heads, queries=queries))
        return SideBySide(parts)

    def judge(self, ids: Tensor, keep: Tensor, seen: SideBySide) -> Tensor:
        """Sentences (B, T) that start with [ENC], each about its own pictures -> logits (B, 2): false, true."""
        (states,) = self.med([Pass(ids, keep, context=seen, first=True)])
        return self.head(F.relu(self.head_dense(states)))


def _linear(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"
