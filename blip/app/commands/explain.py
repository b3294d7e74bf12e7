"""`blip explain`: maps of the image regions that a model matches with a text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blip.app.commands.shared import ModelOptions
from blip.options import argument, option

if TYPE_CHECKING:
    from PIL import Image

    from blip.inference.explain import Explanation

EXAMPLE = """examples:
  blip explain photo.jpg "a dog next to a red bicycle" --out explained.html --model runs/retrieval/model

Writes a page with the image, once as it is, once for the whole text and once for each word, orange where the
cross-attention finds evidence for a match, and prints the probability of a match. Words such as a, of and on are left
out. Exit status: 0, or 2 for wrong use."""

_SIDE = 2048
"""Longer side of the images shown, in pixels."""
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by can for from has have he her his i in is it its my of on or our she so some that "
        "the their them there these they this those to was we were with you your",
    )
)
"""Words that describe nothing in an image; attention rests on them all the same."""


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
    from blip.app.answers import Answers, refuse_page, shown
    from blip.app.loaded import load
    from blip.app.unknown import check_texts

    refuse_page("--out", chosen.out)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer)
    check_texts(loaded.tokenizer, [chosen.text])
    explanation = loaded.explain(original, chosen.text, chosen.layer)
    panels = images(small(original, _SIDE), explanation)
    if chosen.out.endswith((".html", ".htm")):
        made = page(chosen.image, chosen.text, panels, explanation, loaded.trained_on).encode("utf-8", "replace")
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


def shown_words(explanation: Explanation) -> list[int]:
    """Positions of the words that say something about an image; of all words if there are none."""
    chosen = [i for i, word in enumerate(explanation.words) if word.strip(",.;:!?'\"") not in STOP_WORDS]
    return chosen or list(range(len(explanation.words)))


def images(original: Image.Image, explanation: Explanation) -> list[tuple[str, Image.Image]]:
    """The image, then overlaid with the map of the whole text and of each word shown; words share a scale."""
    from blip.inference.explain import overlay

    chosen = shown_words(explanation)
    maps = explanation.maps[chosen]
    whole, strongest = maps.mean(0), float(maps.max())
    words = [(explanation.words[i], overlay(original, heat, strongest)) for i, heat in zip(chosen, maps, strict=True)]
    return [("the image", original), ("the whole text", overlay(original, whole, float(whole.max()))), *words]


def page(name: str, text: str, panels: list[tuple[str, Image.Image]], explanation: Explanation,
         trained_on: Sequence[str] = ()) -> str:  # fmt: skip
    """Build the page: the image first, then where the evidence is, with a legend."""
    from blip.app import html
    from blip.inference.explain import HUE

    chosen = shown_words(explanation)
    sums = [float(explanation.maps[i].sum()) for i in chosen]
    shares = [100 * one / max(sum(sums), 1e-12) for one in sums]
    best = max(range(len(shares)), key=shares.__getitem__)
    side = explanation.maps.shape[-1]
    file = Path(name).name
    labels = ["as it is", "all words shown", *(f"{share:.0f}% of the evidence" for share in shares)]
    cards = [
        html.Card(
            html.thumbnail(image, 320), f"{file}, {title}", [html.Line(title), html.Line(label)][: 1 + bool(label)]
        )
        for (title, image), label in zip(panels, labels, strict=True)
    ]
    return html.page(
        "explain.html",
        title=f"{100 * explanation.probability:.1f}% sure that “{html.cut(text)}” fits the image",
        kind=f"blip explain · {file}",
        lead="Orange marks the parts of the image that speak for a match, one word at a time.",
        figures=[
            html.Figure(f"{100 * explanation.probability:.1f}%", "probability of a match"),
            html.Figure(explanation.words[chosen[best]], "word with the most evidence", labels[2 + best]),
            html.Figure(f"{len(chosen)}", "words shown", f"of {len(explanation.words)}"),
            html.Figure(f"{side * side}", "patches of the image", f"{side} by {side}"),
        ],
        cards=cards,
        trained_on=trained_on,
        hue="#{:02x}{:02x}{:02x}".format(*HUE),
    )


def strip(shown: list[tuple[str, Image.Image]], side: int = 224) -> Image.Image:
    """Put images side by side with their names below."""
    from PIL import Image, ImageDraw

    made = Image.new("RGB", (side * len(shown), side + 20), "white")
    pen = ImageDraw.Draw(made)
    for i, (name, image) in enumerate(shown):
        made.paste(image.resize((side, side), Image.Resampling.LANCZOS), (i * side, 0))
        pen.text((i * side + 6, side + 4), name.encode("latin1", "replace").decode("latin1"), fill="black")
    return made
