"""`blip caption`: caption images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blip.app.commands.shared import ImageOptions, ModelOptions
from blip.app.exit import SOME_FAILED
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS, DecodeConfig
from blip.options import option

if TYPE_CHECKING:
    from blip.app.answers import Answers
    from blip.inference.generate import CaptionText

EXAMPLE = """examples:
  blip caption photo.jpg --model runs/caption/model
  blip caption photos/ 'more/*.png' --num 3 --method nucleus --json --out captions.jsonl

A caption depends on the bytes of its image, the model and these options; not on the other images, their order, the
file's name or --batch. Exit status: 0, or 1 if some images could not be used, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(ImageOptions, ModelOptions):
    """Caption images."""

    preset: Literal["greedy", "caption_2022", "nucleus", "capfilt_2022"] = "caption_2022"
    """Decoding preset, adjusted by the options below; caption_2022 is the paper's captioner"""
    method: Literal["beam", "greedy", "nucleus"] | None = None
    """Beam search, greedy decoding or nucleus sampling (default: the preset's)"""
    num: int | None = option(None, metavar="N")
    """Captions per image (default: 1)"""
    beams: int | None = option(None, metavar="N")
    """Number of beams in beam search"""
    length_rule: Literal["generated", "2022"] | None = None
    """Length by which beams are compared: `generated` counts generated tokens and [SEP], as today's transformers does;
    `2022` counts the prompt too, but not [SEP], as the original does (default: the preset's; 2022 for caption_2022)"""
    top_p: float | None = option(None, metavar="P")
    """Probability mass that nucleus sampling draws from"""
    min_length: int | None = option(None, metavar="N")
    """Minimum number of tokens, prompt included"""
    max_length: int | None = option(None, metavar="N")
    """Maximum number of tokens, prompt included"""
    prompt: str = CAPTION_PROMPT
    """Prompt that captions continue, not part of the answer; '' for a model trained without a prompt"""
    seed: int = option(0, metavar="N")
    """Random seed of sampling"""

    def decoding(self) -> DecodeConfig:
        """The decoding settings that the options describe. ValueError if they contradict each other."""
        names = ("num", "beams", "top_p", "min_length", "max_length", "length_rule", "seed")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        preset = DECODE_PRESETS[self.preset]
        if self.method == "greedy":
            if values.get("num", 1) > 1:
                raise ValueError(f"--method greedy gives one caption, but --num is {self.num}: use beam or nucleus")
            values |= {"method": "beam", "beams": 1, "num": 1}
        elif self.method:
            values["method"] = self.method
        if values.get("method", preset.method) == "beam" and preset.beams > 1:
            values.setdefault("beams", max(preset.beams, values.get("num", 1)))
        return dataclasses.replace(preset, **values)


def run(chosen: CaptionOptions) -> int:
    """Caption the images that the options name; returns the exit status."""
    config = chosen.decoding()
    from blip.data.image_files import find, read_images

    inputs = find(chosen.images)

    # After the checks that need no torch, so that their errors come at once.
    import torch

    from blip.app.answers import Answers, Form, refuse_out
    from blip.app.loaded import load
    from blip.data.transforms import EvalTransform
    from blip.inference.generate import generate_texts

    refuse_out(chosen.out)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer)
    model, tokenizer, side = loaded.model, loaded.tokenizer, loaded.model.config.vision.image_size
    if tokenizer.unknown_rate([chosen.prompt]):
        raise ValueError(f"--prompt {chosen.prompt!r} has words that the model's tokenizer does not know; try ''")

    def describe(images: torch.Tensor, keys: list[str]) -> list[list[CaptionText]]:
        with loaded.computing():
            return generate_texts(model, tokenizer, images.to(loaded.device), config, prompt=chosen.prompt, keys=keys)

    describe(torch.zeros(1, 3, side, side), [""])  # so that settings that do not fit fail before a file is opened
    keys = ("path", "captions", "logprob", "finished")
    ways = {**dataclasses.asdict(config), "prompt": chosen.prompt, **loaded.options(chosen.model)} if chosen.out else {}
    form = Form("caption", chosen.json, keys, "tt", ways, config.num)
    with Answers(chosen.out, inputs, form=form) as answers:
        for files in read_images(answers.to_do, EvalTransform(side), chosen.batch):
            if read := answers.readable(files):
                images = torch.stack([image.pixels for image in read])
                for image, texts in zip(read, describe(images, [image.digest for image in read]), strict=True):
                    _answer(answers, image.path, texts, chosen.json)
            answers.advance(len(files))
    return SOME_FAILED if answers.failed else 0


def _answer(answers: Answers, path: str, texts: list[CaptionText], as_json: bool) -> None:
    if as_json:
        values = {"captions": [text.text for text in texts], "logprob": [round(text.logprob, 3) for text in texts]}
        answers.json({"path": path, **values, "finished": [text.finished for text in texts]})
    else:
        for text in texts:
            answers.text(path, text.text)
