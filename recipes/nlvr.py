"""Fine-tune a model that tells whether a sentence is true of several images, and keep the best epoch (section 5.4).

    accelerate launch -m recipes.nlvr --config recipes/configs/nlvr_world.yaml              # 2 cores
    torchrun --nproc_per_node 8 -m recipes.nlvr --config recipes/configs/nlvr2.yaml --out runs/nlvr2

The same command again continues where the last one stopped. The configs say machine, time and score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blip import dist
from blip.data.prepare.sentences import PrepareSentences, Sentences, open_sentences
from blip.data.settings import ImageSentences
from blip.data.transforms import TrainTransform
from blip.errors import DataError
from blip.models.nlvr import Nlvr
from blip.objectives.nlvr import NlvrObjective
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.world import pairs as world_pairs
from eval.nlvr import MAX_WORDS, answers_of, results_csv, score
from recipes import command
from recipes.building import TaskData, World, build_task, feed_of
from recipes.run import BestModel, Evaluation, FineTuneRun, HeldOut, fine_tune, open_evaluations

Answers = dict[str, bool]
"""What a model holds to be true, by example."""


@dataclass(frozen=True)
class NlvrData(TaskData):
    """Training data of an NLVR model."""

    sources: list[ImageSentences] = field(default_factory=list)
    max_words: int = MAX_WORDS
    """Words kept of a sentence."""
    max_tokens: int = 64
    """Word pieces kept of a sentence, first and last special tokens included."""

    samples = "sentences about several images"


@dataclass(frozen=True)
class HeldOutSentences(HeldOut):
    """Sentences that are not trained on."""

    source: ImageSentences
    """Source of the sentences."""


@dataclass(frozen=True)
class PairWorld(World):
    """Pairs of images of the synthetic world, drawn to disk before a run unless they are there."""

    folder: str = "runs/world-pairs"
    train: int = 2500
    """Sets of training pairs; four pairs each."""
    held_out: int = 150
    """Sets of each of val and test."""

    def write(self, split: str, count: int) -> object:
        return world_pairs.write(self.folder, split, count, size=self.image_size)


@dataclass(frozen=True)
class NlvrRun(FineTuneRun):
    """An NLVR run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    data: NlvrData = field(default_factory=NlvrData)
    validation: HeldOutSentences | None = None
    """Measured at every evaluation; the model with the best accuracy is kept. Without it the last model is."""
    test: HeldOutSentences | None = None
    world: PairWorld | None = None


def judge(run: NlvrRun) -> tuple[Result, Path]:
    """Carry out a run; returns what `fine_tune` does."""
    dist.start(run.train.timeout)
    if run.world:  # the model has as many branches as an example of the data has images
        run.world.draw()
    sources = open_sentences(run.data)
    if not sources:
        raise DataError("no data: give at least one source")
    images = sources[0].count
    model, tokenizer = build_task(Nlvr, run.model, run.train.seed, images=images)
    transform = TrainTransform(model.vision.image_size, run.data)
    data = feed_of(sources, PrepareSentences(transform, tokenizer, run.data), run.train.seed)
    held_out = open_evaluations(run, NlvrEvaluation, images, tokenizer)
    about = f"Tells whether a sentence is true of several images; trained {run.model.origin} with `recipes.nlvr`."
    best = BestModel(run, tokenizer, held_out, by="accuracy", about=about)
    return fine_tune(run, NlvrObjective(model), data, best)


class NlvrEvaluation(Evaluation):
    """Sentences with labels: of how many a model knows whether they are true."""

    def __init__(self, name: str, held_out: HeldOutSentences, images: int, tokenizer: Tokenizer) -> None:
        """Raises DataError for images that are not there, an example without a label, or another number of images."""
        source = Sentences(held_out.source)
        source.check_some_exist()
        self.examples, self.tokenizer = source.examples[: held_out.limit], tokenizer
        if source.count != images:
            raise DataError(f"{name}.source {held_out.source.path} has {source.count} images a row, data has {images}")
        if unknown := next((e for e in self.examples if e.label is None), None):
            raise DataError(f"{name}.source {held_out.source.path}: {unknown.key} has no label")

    def answers(self, model: Nlvr) -> Answers:
        return answers_of(model, self.tokenizer, self.examples)

    def scores(self, answers: Answers) -> dict[str, float]:
        return score(self.examples, answers, resamples=0)

    def files(self, name: str, answers: Answers) -> dict[str, str]:
        return {f"results-{name}.csv": results_csv(self.examples, answers)}


def main() -> None:
    judge(command.read(NlvrRun))


if __name__ == "__main__":
    command.run(main)
