"""`blip caption`: what pictures show, in words."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from blip.app import options
from blip.app.exit import SOME_FAILED
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS, LENGTH_RULES, DecodeConfig

if TYPE_CHECKING:
    from blip.app.answers import Answers
    from blip.inference.generate import Text

EXAMPLE = """examples:
  blip caption photo.jpg --model runs/caption/model
  blip caption photos/ 'more/*.png' --num 3 --method nucleus --json --out captions.jsonl

A caption depends on the bytes of its picture, the model and these options; not on the other pictures, their order, the
file's name or --batch. Exit status: 0, or 1 if some pictures could not be used, or 2 for wrong use."""


def add(commands: argparse._SubParsersAction) -> None:
    """Add `caption` to the sub-commands."""
    parser = commands.add_parser("caption", help="say what pictures show", description=__doc__, epilog=EXAMPLE)
    options.add_images(parser)
    options.add_model(parser)
    parser.add_argument(
        "--preset",
        default="caption_2022",
        choices=DECODE_PRESETS,
        help="ways of writing that the options below change (default: caption_2022, as the paper's captioner)",
    )
    parser.add_argument(
        "--method", choices=("beam", "greedy", "nucleus"), help="search for the likeliest text, or draw (nucleus)"
    )
    parser.add_argument("--num", type=int, metavar="N", help="captions of each picture (default: 1)")
    parser.add_argument("--beams", type=int, metavar="N", help="texts that a search keeps in view")
    parser.add_argument(
        "--length-rule",
        choices=LENGTH_RULES,
        help="what counts as length where beams are compared: generated words with [SEP], as in today's transformers, "
        "or 2022: the prompt too and not [SEP], as in the original (default: the preset's; caption_2022 has 2022)",
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest words of this share")
    parser.add_argument("--min-length", type=int, metavar="N", help="tokens, prompt included")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens, prompt included")
    parser.add_argument(
        "--prompt",
        default=CAPTION_PROMPT,
        help=f"what captions go on from, not part of the answer (default: {CAPTION_PROMPT!r}; '' for a model that was "
        "trained without)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Caption the pictures that the options name; returns the exit status."""
    config = decoding(chosen)
    from blip.data.image_files import find, read_images

    found = find(chosen.images)

    # After the checks that need no torch, so that their errors come at once.
    import torch

    from blip.app.answers import Answers, Form, refuse_out
    from blip.app.loaded import load
    from blip.data.transforms import EvalTransform
    from blip.inference.generate import write

    refuse_out(chosen.out)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer)
    model, tokenizer, side = loaded.model, loaded.tokenizer, loaded.model.config.vision.image_size
    if tokenizer.unknown_rate([chosen.prompt]):
        raise ValueError(f"--prompt {chosen.prompt!r} has words that the model's tokenizer does not know; try ''")

    def describe(images: torch.Tensor, keys: list[str]) -> list[list[Text]]:
        with loaded.computing():
            return write(model, tokenizer, images.to(loaded.device), config, prompt=chosen.prompt, keys=keys)

    describe(torch.zeros(1, 3, side, side), [""])  # what does not fit is found before a file is opened
    keys = ("path", "captions", "logprob", "finished")
    ways = {**dataclasses.asdict(config), "prompt": chosen.prompt, **loaded.options(chosen.model)} if chosen.out else {}
    form = Form("caption", chosen.json, keys, "tt", ways, config.num)
    with Answers(chosen.out, found, form=form) as answers:
        for pictures in read_images(answers.to_do, EvalTransform(side), chosen.batch):
            if read := answers.readable(pictures):
                images = torch.stack([picture.pixels for picture in read])
                for picture, texts in zip(read, describe(images, [picture.digest for picture in read]), strict=True):
                    _answer(answers, picture.path, texts, chosen.json)
            answers.advance(len(pictures))
    return SOME_FAILED if answers.failed else 0


def _answer(answers: Answers, path: str, texts: list[Text], as_json: bool) -> None:
    if as_json:
        values = {"captions": [text.words for text in texts], "logprob": [round(text.logprob, 3) for text in texts]}
        answers.json({"path": path, **values, "finished": [text.finished for text in texts]})
    else:
        for text in texts:
            answers.text(path, text.words)


def decoding(chosen: argparse.Namespace) -> DecodeConfig:
    """How captions are written, by the options. ValueError if they do not go together."""
    names = ("num", "beams", "top_p", "min_length", "max_length", "length_rule", "seed")
    values = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    preset = DECODE_PRESETS[chosen.preset]
    if chosen.method == "greedy":
        if values.get("num", 1) > 1:
            raise ValueError(f"--method greedy writes one text, --num asks for {values['num']}: use beam or nucleus")
        values |= {"method": "beam", "beams": 1, "num": 1}
    elif chosen.method:
        values["method"] = chosen.method
    if values.get("method", preset.method) == "beam" and preset.beams > 1:
        values.setdefault("beams", max(preset.beams, values.get("num", 1)))
    return dataclasses.replace(preset, **values)
