"""`blip vqa`: answers to a question about images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blip.app.commands.shared import ImageOptions, ModelOptions, at_least
from blip.app.exit import SOME_FAILED
from blip.options import argument, option

if TYPE_CHECKING:
    from blip.app.answers import Answers
    from blip.app.loaded import Loaded
    from blip.inference.answering import Answer, Candidates

EXAMPLE = """examples:
  blip vqa photo.jpg "what is on the table?" --model runs/vqa/model
  blip vqa photos/ "how many people are there?" --top 3 --json
  blip vqa photo.jpg "is it raining?" --candidates answers.txt

One line for each image and answer: path, answer, probability. Answers are chosen from the model's own candidates, from
those of --candidates, or generated freely (--method generate). The probability is that of exactly these words.
Exit status: 0, or 1 if some images could not be used, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(ImageOptions, ModelOptions):
    """Answer a question about images."""

    question: str = argument("QUESTION")
    """Question, in quotes"""
    top: int = option(1, metavar="N")
    """Number of answers per image"""
    method: Literal["auto", "rank", "generate"] = "auto"
    """Rank candidates or generate freely; `auto` ranks if there are candidates"""
    candidates: str | None = option(None, metavar="FILE")
    """Answers to choose from: a JSON list, or one per line (default: the model's)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, top=self.top)


def run(chosen: QuestionOptions) -> int:
    """Answer the question about the images that the options name; returns the exit status."""
    from blip.text import clean_question

    if not clean_question(chosen.question):
        raise ValueError(f"the question {chosen.question!r} has no words")
    from blip.data.image_files import find, read_images

    inputs = find(chosen.images)

    # After the checks that need no torch, so that their errors come at once.
    import torch

    from blip.app.answers import Answers, Form, refuse_out
    from blip.app.loaded import load
    from blip.app.unknown import check_question
    from blip.models.vqa import Vqa

    refuse_out(chosen.out)
    loaded = load(chosen.model, chosen.device, chosen.precision, Vqa, tokenizer=chosen.tokenizer, batch=chosen.batch)
    check_question(loaded.tokenizer, chosen.question)
    candidates = loaded.candidates(chosen.candidates, chosen.method)
    how = {"top": chosen.top, "candidates": candidates, "method": chosen.method, "details": True}
    side = loaded.image_size
    loaded.answer(torch.zeros(1, 3, side, side), chosen.question, **how)  # so that what does not fit fails first
    keys = ("path", "question", "answers", "probability")
    form = Form("vqa", chosen.json, keys, "ttn", _ways(chosen, loaded, candidates) if chosen.out else {},
                min(chosen.top, len(candidates)) if candidates else 1)  # fmt: skip
    with Answers(chosen.out, inputs, form=form) as out:
        for files in read_images(out.to_do, loaded.transform, chosen.batch):
            if read := out.readable(files):
                replies = loaded.answer(torch.stack([image.pixels for image in read]), chosen.question, **how)
                for image, best in zip(read, replies, strict=True):
                    _give(out, image.path, chosen.question, best, chosen.json)
            out.advance(len(files))
    return SOME_FAILED if out.failed else 0


def _ways(chosen: QuestionOptions, loaded: Loaded, candidates: Candidates | None) -> dict[str, object]:
    """Options that the answers depend on."""
    among = hashlib.sha256(json.dumps(candidates.texts).encode()).hexdigest()[:16] if candidates else None
    return {"question": chosen.question, "top": chosen.top, "candidates": among, **loaded.options(chosen.model)}


def _give(out: Answers, path: str, question: str, best: list[Answer], as_json: bool) -> None:
    chances = [answer.probability for answer in best]
    if as_json:
        values = {"answers": [answer.text for answer in best], "probability": [round(chance, 5) for chance in chances]}
        out.json({"path": path, "question": question, **values})
    else:
        for answer, chance in zip(best, chances, strict=True):
            out.text(path, answer.text, f"{chance:.4f}")
