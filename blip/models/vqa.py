"""Visual question answering: a question encoded over the image, an answer decoded over it (paper, section 5.3).

The two text transformers share nothing. A question's states are projected once (`Vqa.context`), however many answers
are then scored or decoded. B images, R questions, P image tokens, T question tokens, D width, V vision width.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from blip.models import inherit
from blip.models.blip import Blip, med
from blip.models.inherit import WeightOrigin
from blip.models.protocols import Generates, Matches, require
from blip.models.settings import BlipConfig
from blip.nn.context import Context
from blip.nn.text import TextPass, TextTransformer
from blip.nn.vision import VisionEncoder


class Vqa(nn.Module):
    """An image encoder, a question encoder over the image, and an answer decoder over the question.

    `generate` and `generate_texts` of `blip.inference` accept it in place of a `Blip`, with a context of questions, not
    images.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.question = med(config.text, ("text",), self.vision.width)
        self.answer = med(config.text, ("causal",), config.text.width)

    @classmethod
    def from_blip(cls, blip: Blip) -> Self:
        """Build a model with the weights of a pre-trained one, as `origin` says; new weights are random."""
        require(blip, Matches, Generates)
        model = cls(blip.config)
        inherit.copy(model, blip, model.origin())
        return model.train(blip.training)

    def origin(self) -> WeightOrigin:
        """Sources of initial weights: both stacks from the pre-trained one, as in the 2022 release.

        So is the decoder's cross-attention, which was trained on image tokens, except for the matrices of keys and
        values where images and texts differ in width (ViT-L); their biases are copied.
        """
        copied = inherit.under("vision", self.vision.state_dict(), "vision")
        copied |= inherit.under("question", self.question.state_dict(), "med")
        copied |= inherit.under("answer", self.answer.state_dict(), "med")
        fresh = {}
        if self.vision.width != self.config.text.width:
            why = f"attends to questions {self.config.text.width} wide, not images {self.vision.width} wide"
            fresh = {name: why for name in copied if name.startswith("answer.") and name.endswith(".cross.kv.weight")}
        for name in fresh:
            del copied[name]
        unused = dict.fromkeys(("temperature", *_head("image_proj"), *_head("text_proj")), "nothing is contrasted")
        unused |= dict.fromkeys(_head("match_head"), "nothing is matched")
        return WeightOrigin(copied, fresh, unused)

    @property
    def decoder(self) -> TextTransformer:
        """The answer decoder."""
        return self.answer

    def context(self, ids: Tensor, keep: Tensor, image: Context, queries: int | None = None) -> Context:
        """Questions (R, T) that start with [ENC], over images (`question.context`) -> the context of answers.

        Padding of questions is masked. `queries` as in `Stack.context`.
        """
        one = TextPass(ids, keep, context=image)
        (states,) = self.question([one])
        return self.answer.context(one.layout.unpack(states), keep, queries)


def _head(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"
