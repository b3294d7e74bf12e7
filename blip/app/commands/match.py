"""`blip match`: scores of texts and images, by ITC and by ITM."""

from __future__ import annotations

from dataclasses import dataclass

from blip.app.commands.shared import AnswerOptions, ModelOptions
from blip.app.exit import SOME_FAILED
from blip.options import argument

EXAMPLE = """examples:
  blip match photo.jpg "a dog on the beach" "a cat" --model runs/retrieval/model
  blip match photos/ "a dog" --json

One line for each image and text: path, ITC (cosine, -1 to 1), ITM (probability of a match), text. ITM is the more
accurate; ITC is the fast score by which searches pre-select.
Exit status: 0, or 1 if some images could not be used, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class MatchOptions(AnswerOptions, ModelOptions):
    """Score how well texts match images, by ITC and by ITM."""

    image: str = argument("IMAGE")
    """Image, folder of images or quoted glob"""
    texts: list[str] = argument("TEXT")
    """Text to compare with the image"""


def run(chosen: MatchOptions) -> int:
    """Match the image or images with the texts; returns the exit status."""
    from blip.data.image_files import find, read_images

    inputs = find([chosen.image])

    # After the checks that need no torch, so that their errors come at once.
    import torch

    from blip.app.answers import Answers, Form, refuse_out, shown
    from blip.app.loaded import load
    from blip.app.unknown import check_texts

    refuse_out(chosen.out)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer, batch=chosen.batch)
    loaded.require("match")
    check_texts(loaded.tokenizer, chosen.texts)  # before a file is opened
    ways = {"texts": chosen.texts, **loaded.options(chosen.model)} if chosen.out else {}
    form = Form("match", chosen.json, ("path", "texts", "itc", "itm"), "tnnt", ways, len(chosen.texts))
    with Answers(chosen.out, inputs, form=form) as answers:
        for images in read_images(answers.to_do, loaded.transform, chosen.batch):
            if read := answers.readable(images):
                matches = loaded.match(torch.stack([image.pixels for image in read]), chosen.texts)
                itc, itm = matches.itc.tolist(), matches.probability.tolist()
                for image, cosines, chances in zip(read, itc, itm, strict=True):
                    if chosen.json:
                        values = {"itc": [round(v, 5) for v in cosines], "itm": [round(v, 5) for v in chances]}
                        answers.json({"path": image.path, "texts": chosen.texts, **values})
                    else:
                        for text, cosine, chance in zip(chosen.texts, cosines, chances, strict=True):
                            answers.text(image.path, f"{cosine:.4f}", f"{chance:.4f}", shown(text))
            answers.advance(len(images))
    return SOME_FAILED if answers.failed else 0
