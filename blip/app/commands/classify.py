"""`blip classify`: zero-shot classification of images by class names."""

from __future__ import annotations

from dataclasses import dataclass

from blip.app.commands.shared import ImageOptions, ModelOptions, at_least
from blip.app.exit import SOME_FAILED
from blip.errors import DataError
from blip.options import option

EXAMPLE = """examples:
  blip classify photo.jpg --classes "dog,cat,polar bear" --model runs/retrieval/model
  blip classify photos/ --classes-file imagenet.txt --top 5 --template "a photo of a {}." --json

One line for each image and each of its --top classes: path, class, probability. The probabilities of all classes add
up to 1 even if the image shows none of them; for an absolute score use blip match. Exit status: 0, or 1 if some images
could not be used, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(ImageOptions, ModelOptions):
    """Classify images by class names, without training."""

    classes: str | None = option(None, metavar="A,B,...")
    """Class names, separated by commas"""
    classes_file: str | None = option(None, metavar="FILE")
    """File of class names, one per line, instead of --classes"""
    template: list[str] = option(list, metavar="TEXT", repeat=True)
    """Prompt template with {} in place of the class name; several are averaged (default: seven templates)"""
    top: int = option(1, metavar="N")
    """Number of classes per image"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, top=self.top)
        if (self.classes is None) == (self.classes_file is None):
            raise ValueError("give either --classes A,B,... or --classes-file FILE")


def run(chosen: ClassifyOptions) -> int:
    """Classify the images that the options name; returns the exit status."""
    names = _names(chosen)
    from blip.data.image_files import find, read_images

    inputs = find(chosen.images)

    # After the checks that need no torch, so that their errors come at once.
    import torch

    from blip.app.answers import Answers, Form, refuse_out, shown
    from blip.app.loaded import load
    from blip.app.unknown import check_texts
    from blip.inference.zero_shot import TEMPLATES, class_embeddings, probabilities

    refuse_out(chosen.out)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer, batch=chosen.batch)
    check_texts(loaded.tokenizer, names, what="class ")
    classes = class_embeddings(loaded.embed_text, names, chosen.template or TEMPLATES)
    keys = ("path", "classes", "probability")
    ways = {"classes": names, "template": chosen.template or None, "top": chosen.top}
    form = Form("classify", chosen.json, keys, "ttn", ways | loaded.options(chosen.model) if chosen.out else {},
                min(chosen.top, len(names)))  # fmt: skip
    with Answers(chosen.out, inputs, form=form) as answers:
        for images in read_images(answers.to_do, loaded.transform, chosen.batch):
            if read := answers.readable(images):
                embeds = loaded.embed_image(torch.stack([image.pixels for image in read]))
                best = probabilities(embeds, classes, loaded.model.temperature).topk(min(chosen.top, len(names)), dim=1)
                for image, chances, numbers in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
                    likeliest = [names[number] for number in numbers]
                    if chosen.json:
                        values = {"classes": likeliest, "probability": [round(chance, 5) for chance in chances]}
                        answers.json({"path": image.path, **values})
                    else:
                        for name, chance in zip(likeliest, chances, strict=True):
                            answers.text(image.path, shown(name), f"{chance:.4f}")
            answers.advance(len(images))
    return SOME_FAILED if answers.failed else 0


def _names(chosen: ClassifyOptions) -> list[str]:
    if chosen.classes is not None:
        names, where = chosen.classes.split(","), f"--classes {chosen.classes!r}"
    else:
        where = chosen.classes_file
        try:
            with open(where, encoding="utf-8-sig") as file:
                names = file.read().splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{where} is not UTF-8 text; expected class names, one per line") from None
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"{where} contains no class names")
    return names
