"""Compute the cost of pre-training and CapFilt: floating-point operations, and GPU-hours at given utilizations.

    python -m benchmarks.cost

Prints the tables of docs/scaling.md. A multiply-add is two operations; softmax, norms and losses are left out (under
1%). A backward pass costs twice its forward. P image tokens, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch

from blip.models.presets import BASE, LARGE
from blip.models.settings import BlipConfig

CAPTION_TOKENS = 13
"""Mean length of COCO's captions in BERT's pieces, [CLS] and [SEP] included (13.07 over 20,009 captions of val2014)."""
WRITTEN_TOKENS = 20
"""Tokens of a text that CapFilt generates or matches: the longest, by its defaults."""
EPOCHS = 20
"""Epochs of the paper's pre-training."""
PAIRS = {"14M": 14e6, "129M": 129e6}
"""Pairs in the paper's two data sets."""
PEAKS = {"A100": 312e12, "H200": 989e12}
"""Dense bfloat16 operations per second, from NVIDIA's data sheets."""
NAIVE, ONCE = "image projected again for every word and text", "each tower once"
"""Two ways to run CapFilt: the original's code, and ours."""
UTILISATIONS = (0.15, 0.3, 0.45)
"""Assumed shares of the peak; those of this code have not been measured."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that the counts depend on."""

    patches: int
    """Patches per image; the class token is one token more."""
    pixels: int
    """Numbers per patch: pixels times channels."""
    vision_width: int
    vision_depth: int
    text: BlipConfig
    """Configuration with the text transformer's sizes."""

    @classmethod
    def of(cls, config: BlipConfig, image_size: int) -> Shape:
        with torch.device("meta"):
            vit = timm.create_model(config.vision.model)
        patch = vit.patch_embed.patch_size[0]
        return cls((image_size // patch) ** 2, 3 * patch**2, vit.embed_dim, len(vit.blocks), config)


def vision(shape: Shape) -> float:
    """Operations of the ViT on an image: 12 width^2 weights per block, and two products among the tokens."""
    width, tokens = shape.vision_width, shape.patches + 1
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    return 2 * (shape.vision_depth * block + shape.patches * shape.pixels * width)


def context(shape: Shape) -> float:
    """Operations to project an image to keys and values for every layer of the text transformer."""
    text = shape.text.text
    return 2 * text.layers * (shape.patches + 1) * shape.vision_width * 2 * text.width


def reading(shape: Shape, tokens: float, grounded: bool) -> float:
    """Operations of the text transformer on a text, attending to an image's keys and values if `grounded`."""
    text, seen = shape.text.text, shape.patches + 1
    token = 4 * text.width**2 + 2 * text.width * text.hidden + 2 * tokens * text.width
    if grounded:
        token += 2 * text.width**2 + 2 * seen * text.width
    return 2 * text.layers * tokens * token


def words(shape: Shape, tokens: float) -> float:
    """Operations of the vocabulary head at every token."""
    return 2 * tokens * shape.text.text.width * shape.text.text.vocab_size


def pretraining(shape: Shape, tokens: float = CAPTION_TOKENS) -> float:
    """Operations of pre-training on a pair: ITC, ITM with two negatives and LM, with backward, and the teacher."""
    grounded = reading(shape, tokens, grounded=True)
    towers = vision(shape) + reading(shape, tokens, grounded=False)
    student = towers + context(shape) + 3 * grounded + grounded + words(shape, tokens)
    return 3 * student + towers


def capfilt(shape: Shape, tokens: int = WRITTEN_TOKENS) -> dict[str, float]:
    """Operations of CapFilt on an image with one web text (one caption generated, two texts matched), in three ways."""
    see, project = vision(shape), context(shape)
    match = reading(shape, tokens, grounded=True)
    write = match + words(shape, tokens)
    return {
        NAIVE: 3 * see + (tokens + 2) * project + write + 2 * match,
        ONCE: 2 * (see + project) + write + 2 * match,
        "one tower, if the weights are equal": see + 2 * project + write + 2 * match,
    }


def hours(operations: float, peak: float, utilisation: float) -> float:
    """GPU-hours of some operations."""
    return operations / (peak * utilisation) / 3600


SHAPES = {
    "BASE, 224 px": Shape.of(BASE, 224),
    "BASE, 384 px": Shape.of(BASE, 384),
    "LARGE, 224 px": Shape.of(LARGE, 224),
    "LARGE, 384 px": Shape.of(LARGE, 384),
}


def tables() -> list[str]:
    """The tables of docs/scaling.md, in Markdown, in its order."""
    return [_pretraining(), _pretraining_hours(), _capfilt(), _capfilt_hours()]


def _pretraining() -> str:
    lengths = (CAPTION_TOKENS, 20, 30)
    rows = [
        [name, *(f"{pretraining(SHAPES[name], tokens) / 1e9:.0f}" for tokens in lengths)]
        for name in ("BASE, 224 px", "LARGE, 224 px")
    ]
    return _table(["GFLOP per pair", *(f"texts of {tokens:g} tokens" for tokens in lengths)], rows)


def _pretraining_hours() -> str:
    rows = []
    for name in ("BASE, 224 px", "LARGE, 224 px"):
        for pairs, count in PAIRS.items():
            all_of_it = pretraining(SHAPES[name]) * count * EPOCHS
            rows.append([name, pairs, f"{all_of_it:.1e}", *_at_every_rate(all_of_it)])
    return _table(["model", "pairs", "FLOP, 20 epochs", *_rates()], rows)


def _capfilt() -> str:
    rows = []
    for name, shape in SHAPES.items():
        if name != "LARGE, 224 px":
            rows.append([name, *(f"{count / 1e9:,.0f}" for count in capfilt(shape).values())])
    return _table(["GFLOP per image", *capfilt(SHAPES["BASE, 384 px"])], rows)


def _capfilt_hours() -> str:
    once = capfilt(SHAPES["BASE, 384 px"])[ONCE]
    rows = [[pairs, *_at_every_rate(once * count)] for pairs, count in PAIRS.items()]
    return _table(["images, BASE at 384 px", *_rates()], rows)


def _rates() -> list[str]:
    return [f"{gpu} hours at {share:.0%}" for gpu in PEAKS for share in UTILISATIONS]


def _at_every_rate(operations: float) -> list[str]:
    return [f"{hours(operations, peak, share):,.0f}" for peak in PEAKS.values() for share in UTILISATIONS]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
