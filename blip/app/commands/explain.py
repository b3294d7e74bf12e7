"""`blip explain`: maps of the image regions that a model matches with a text."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blip.app.commands.shared import ModelOptions
from blip.options import argument, option

if TYPE_CHECKING:
    from PIL import Image

    from blip.inference.explain import Explanation

EXAMPLE = """examples:
  blip explain photo.jpg "a dog next to a red bicycle" --out explained.html --model runs/retrieval/model

Writes a page with the image once for the whole text and once for each word, red where the cross-attention finds
evidence for a match, and prints the probability of a match. Exit status: 0, or 2 for wrong use."""

_SIDE = 2048
"""Longer side of the images shown, in pixels."""


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(ModelOptions):
    """Show where the model looks when it matches a text with an image."""

    image: str = argument("IMAGE")
    """Image"""
    text: str = argument("TEXT")
    """Text to explain"""
    out: str = option(metavar="FILE")
    """Page (.html) or strip of images (.png, .jpg) to write"""
    layer: int | None = option(None, metavar="N")
    """Cross-attention layer to use, from 0 (default: 7 of 12, as the authors show)"""


def run(chosen: ExplainOptions) -> int:
    """Write the page or strip; returns the exit status."""
    if not chosen.out.endswith((".html", ".htm", ".png", ".jpg", ".jpeg")):
        raise ValueError(f"--out {chosen.out}: give a name that ends in .html, .png or .jpg")
    from pathlib import Path

    from PIL.PngImagePlugin import PngInfo

    from blip.data.images import UnreadableImage, decode, small
    from blip.data.settings import DataConfig
    from blip.errors import DataError

    try:
        original = decode(Path(chosen.image), DataConfig.max_pixels)
    except UnreadableImage as error:
        raise DataError(f"{chosen.image}: {error.reason}") from None

    # After the checks that need no torch, so that their errors come at once.
    from blip import files
    from blip.app import page
    from blip.app.answers import Answers, refuse_page, shown
    from blip.app.loaded import load

    refuse_page("--out", chosen.out)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer)
    explanation = loaded.explain(original, chosen.text, chosen.layer)
    panels = images(small(original, _SIDE), explanation)
    if chosen.out.endswith((".html", ".htm")):
        total = max(float(explanation.maps.sum()), 1e-12)
        shares = [100.0, *(100 * float(heat.sum()) / total for heat in explanation.maps)]
        cards = [
            page.Captioned("share of the evidence", image, name, share, [])
            for (name, image), share in zip(panels, shares, strict=True)
        ]
        legend = f"Probability of a match: {100 * explanation.probability:.1f}%. Red is evidence for it, blue is none."
        made = page.page(chosen.text, [("Where it looks", legend, page.captioned(cards))]).encode("utf-8", "replace")
    else:
        buffer = io.BytesIO()
        if chosen.out.endswith(".png"):
            mark = PngInfo()
            mark.add_text("Software", "openblip")
            strip(panels).save(buffer, "PNG", pnginfo=mark)
        else:
            strip(panels).save(buffer, "JPEG", comment=b"openblip explain")
        made = buffer.getvalue()
    files.replace_file(Path(chosen.out), made)
    with Answers(None, 1) as answers:
        answers.text(chosen.image, f"{explanation.probability:.4f}", shown(chosen.out))
    return 0


def images(original: Image.Image, explanation: Explanation) -> list[tuple[str, Image.Image]]:
    """The image overlaid with the map of the whole text and of each word; words share a scale."""
    from blip.inference.explain import overlay

    strongest = float(explanation.maps.max())
    words = [
        (word, overlay(original, heat, strongest))
        for word, heat in zip(explanation.words, explanation.maps, strict=True)
    ]
    return [("the whole text", overlay(original, explanation.whole, float(explanation.whole.max()))), *words]


def strip(shown: list[tuple[str, Image.Image]], side: int = 224) -> Image.Image:
    """Put images side by side with their names below."""
    from PIL import Image, ImageDraw

    made = Image.new("RGB", (side * len(shown), side + 20), "white")
    pen = ImageDraw.Draw(made)
    for i, (name, image) in enumerate(shown):
        made.paste(image.resize((side, side), Image.Resampling.LANCZOS), (i * side, 0))
        pen.text((i * side + 6, side + 4), name.encode("latin1", "replace").decode("latin1"), fill="black")
    return made
