"""Fine-tune a captioner: the LM loss behind a prompt, and the best epoch by CIDEr (paper, section 5.2).

    accelerate launch -m recipes.caption --config recipes/configs/caption_world.yaml          # 2 cores, minutes
    torchrun --nproc_per_node 8 -m recipes.caption --config recipes/configs/caption_coco.yaml --out runs/captioner

Repeat the command to continue an interrupted run. Each config states machine, time and score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip.errors import DataError, counted
from blip.inference.generate import generate_texts
from blip.inference.settings import DecodeConfig
from blip.models.blip import Blip
from blip.objectives.caption import Caption, CaptionConfig
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.world.judge import grade, judge
from blip.world.scene import scene_of
from eval.captioning import captions_of, coco_results, score
from eval.images import Images
from eval.references import ImageId
from recipes import command
from recipes.building import WorldChoice, build_feed
from recipes.run import BestModel, Evaluation, FineTuneRun, HeldOut, begin, fine_tune, open_evaluations

Captions = dict[ImageId, str]
"""Generated captions by image."""
References = Mapping[ImageId, Sequence[str]]
Grader = Callable[[Captions], dict[str, float]]
"""Maps the captions of all images of a held-out set to named scores."""


@dataclass(frozen=True)
class CaptionRun(FineTuneRun):
    """A captioning run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    objective: CaptionConfig = field(default_factory=CaptionConfig)
    """Settings of the loss."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How captions of held-out images are generated; the model with the best CIDEr is kept."""
    world: WorldChoice | None = None


def caption(run: CaptionRun) -> tuple[Result, Path]:
    """Fine-tune a captioner; returns what `fine_tune` does."""
    model, tokenizer = begin(run)
    data = build_feed(run.data, model.vision.image_size, tokenizer, run.train.seed)
    held_out = open_evaluations(run, CaptionEvaluation, run, model, tokenizer)
    about = f"A captioner, trained {run.model.origin} with `recipes.caption`; captions continue {run.data.prompt!r}."
    return fine_tune(
        run, Caption(model, run.objective), data, BestModel(run, tokenizer, held_out, by="cider", about=about)
    )


class CaptionEvaluation(Evaluation):
    """Caption scores on images with reference captions."""

    def __init__(self, name: str, held_out: HeldOut, run: CaptionRun, model: Blip, tokenizer: Tokenizer) -> None:
        """Open the images, and try the first one and a blank one.

        Raises DataError for an image that is missing or has no references, ValueError for a caption length that does
        not fit the model or the prompt.
        """
        self.images = Images.open(held_out.source, held_out.limit, run.data.remote)
        self.tokenizer, self.decode, self.prompt = tokenizer, run.decode, run.data.prompt
        references = self.images.references
        if bare := [image for image, captions in references.items() if not captions]:
            raise DataError(f"{name}.source {held_out.source.path}: no reference captions for {counted(bare, 'image')}")
        self.graders = graders(references)
        self.images.image(0)
        side = model.vision.image_size
        generate_texts(
            model.eval(), tokenizer, torch.zeros(1, 3, side, side), run.decode, prompt=self.prompt, keys=[""]
        )

    def answers(self, model: Blip) -> Captions:
        return captions_of(model, self.tokenizer, self.images, self.decode, prompt=self.prompt)

    def scores(self, captions: Captions) -> dict[str, float]:
        return {name: value for grader in self.graders for name, value in grader(captions).items()}

    def files(self, name: str, captions: Captions) -> dict[str, str]:
        return {f"captions-{name}.json": coco_results(captions)}


def graders(references: References) -> list[Grader]:
    """Graders of captions of these images: against human captions, and against the truth where it is known."""
    return [agreement(references), *truth(references)]


def agreement(references: References) -> Grader:
    """CIDEr, BLEU and ROUGE-L against the references, tokenized without Java: the same on every machine."""
    return lambda captions: score(references, captions, tokenizer="python", resamples=0).values


def truth(images: Iterable[ImageId]) -> list[Grader]:
    """Attribute precision and recall on images of the synthetic world; no grader for other images."""
    try:
        scenes = {image: scene_of(str(image)) for image in images}
    except ValueError:
        return []

    def scores(captions: Captions) -> dict[str, float]:
        graded = grade(judge(scene, captions[image]) for image, scene in scenes.items())
        return {f"attribute_{name}": graded[name] for name in ("precision", "recall")} | {"all_true": graded["true"]}

    return [scores]


def main() -> None:
    caption(command.read(CaptionRun))


if __name__ == "__main__":
    command.run(main)
