"""Fine-tune a captioner: the LM loss behind a prompt, and the best epoch by CIDEr (paper, section 5.2).

    accelerate launch -m recipes.caption --config recipes/configs/caption_world.yaml          # 2 cores, minutes
    torchrun --nproc_per_node 8 -m recipes.caption --config recipes/configs/caption_coco.yaml --out runs/captioner

The same command again continues where the last one stopped. The configs say machine, time and score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip import dist
from blip.data.settings import DataConfig, SourceConfig
from blip.errors import DataError, counted
from blip.inference.generate import write
from blip.inference.settings import DecodeConfig
from blip.models.blip import Blip
from blip.objectives.caption import Caption, CaptionConfig
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.train.settings import TrainConfig
from blip.world.judge import grade, judge
from blip.world.scene import scene_of
from eval.captioning import captions_of, coco_results, score
from eval.pictures import Pictures
from eval.references import Id
from recipes import command, keeping
from recipes.building import ModelChoice, WorldChoice, build_feed, build_model, draw_world

Captions = dict[Id, str]
"""What was written, by image."""
References = Mapping[Id, Sequence[str]]
Grader = Callable[[Captions], dict[str, float]]
"""Captions of all images of a held-out set -> named scores."""


@dataclass(frozen=True)
class HeldOut:
    """Pictures with reference captions, which are not trained on."""

    source: SourceConfig
    """Where they are; rows of one image are taken together."""
    limit: int | None = None
    """Images to use, from the first on; all when not given."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}")


@dataclass(frozen=True)
class Run:
    """A captioning run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, results.json, captions-*.json, metrics.jsonl, checkpoints/, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model to fine-tune, usually `start_from` a pre-training run's."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is shown, and the prompt."""
    objective: CaptionConfig = field(default_factory=CaptionConfig)
    """The loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How captions of held-out pictures are written."""
    validation: HeldOut | None = None
    """Captioned at every evaluation; the model with the best CIDEr is kept. Without it the last model is."""
    test: HeldOut | None = None
    """Captioned once, at the end, by the model that was kept."""
    world: WorldChoice | None = None
    """Draw the embedded world first."""


def caption(run: Run) -> tuple[Result, Path]:
    """Carry out a run; returns how it ended, with the scores of the model that was kept, and that model's folder.

    The scores are those of results.json: the validation's under their own names, the test's as `test_...`.
    """
    dist.start(run.train.timeout)
    model, tokenizer = build_model(run.model, run.train.seed)
    if run.world:
        draw_world(run.world)
    feed, fingerprint = build_feed(run.data, model.vision.image_size, tokenizer, run.train.seed)
    validation = Exam("validation", run.validation, run, model, tokenizer) if run.validation else None
    test = Exam("test", run.test, run, model, tokenizer) if run.test else None
    kept = Kept(Path(run.out), tokenizer, run)
    return keeping.fine_tune(Caption(model, run.objective), feed, fingerprint, run, kept, validation, test)


# Scores ---------------------------------------------------------------------------------------------------------------


class Exam:
    """A held-out set: what a model writes about its pictures, and how good that is."""

    def __init__(self, name: str, held: HeldOut, run: Run, model: Blip, tokenizer: Tokenizer) -> None:
        """Opens it, and tries the first picture, so that what does not fit is said before the training.

        Raises DataError for a picture without references or that is not there, ValueError for a length of captions that
        does not fit the model or the prompt.
        """
        self.pictures = Pictures.open(held.source, held.limit)
        self.tokenizer, self.decode, self.prompt = tokenizer, run.decode, run.data.prompt
        references = self.pictures.references
        if bare := [image for image, captions in references.items() if not captions]:
            raise DataError(f"{name}.source {held.source.path}: no reference captions for {counted(bare, 'image')}")
        self.graders = graders(references)
        self.pictures.picture(0)
        side = model.vision.image_size
        write(model.eval(), tokenizer, torch.zeros(1, 3, side, side), run.decode, prompt=self.prompt, keys=[""])

    def answers(self, model: Blip) -> Captions:
        """One caption of each picture; all processes share the work and each returns all."""
        return captions_of(model, self.tokenizer, self.pictures, self.decode, prompt=self.prompt)

    def scores(self, captions: Captions) -> dict[str, float]:
        """What the graders say, as fractions."""
        return {name: value for grader in self.graders for name, value in grader(captions).items()}


def graders(references: References) -> list[Grader]:
    """By what captions of these images are scored: people's captions, and the truth where it is known."""
    return [agreement(references), *truth(references)]


def agreement(references: References) -> Grader:
    """CIDEr, BLEU and ROUGE-L against the references. Words are split without Java: the same on every machine."""
    return lambda captions: score(references, captions, tokenizer="python", resamples=0).values


def truth(images: Iterable[Id]) -> list[Grader]:
    """How much of what is said of the picture world is true; no grader for other pictures."""
    try:
        scenes = {image: scene_of(str(image)) for image in images}
    except ValueError:
        return []

    def told(captions: Captions) -> dict[str, float]:
        found = grade(judge(scene, captions[image]) for image, scene in scenes.items())
        return {f"attribute_{name}": found[name] for name in ("precision", "recall")} | {"all_true": found["true"]}

    return [told]


# The model that is kept -----------------------------------------------------------------------------------------------


class Kept(keeping.Kept):
    """The captioner with the best CIDEr, and what it wrote."""

    selected_by = "cider"

    def about(self, start: str) -> str:
        return f"A captioner, trained {start} with `recipes.caption`; its texts go on from {self.run.data.prompt!r}."

    def written(self, name: str, answers: Captions) -> dict[str, str]:
        return {f"captions-{name}.json": coco_results(answers)}


def main() -> None:
    caption(command.read(Run))


if __name__ == "__main__":
    command.run(main)
