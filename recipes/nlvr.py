"""Fine-tune a model that decides whether a sentence is true of several images; keep the best epoch (section 5.4).

    accelerate launch -m recipes.nlvr --config recipes/configs/nlvr_world.yaml              # 2 cores
    torchrun --nproc_per_node 8 -m recipes.nlvr --config recipes/configs/nlvr2.yaml --out runs/nlvr2

Repeat the command to continue an interrupted run. Each config states machine, time and score.
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
"""Whether the model holds the sentence true, by example."""


@dataclass(frozen=True)
class NlvrData(TaskData):
    """Training data of an NLVR model."""

    sources: list[ImageSentences] = field(default_factory=list)
    max_words: int = MAX_WORDS
    """Most words of a sentence; the rest is cut off."""
    max_tokens: int = 64
    """Most word pieces of a sentence, first and last special tokens included; the rest is cut off."""

    samples = "sentences about several images"


@dataclass(frozen=True)
class HeldOutSentences(HeldOut):
    """Sentences that are not trained on."""

    source: ImageSentences
    """Source of the sentences."""


@dataclass(frozen=True)
class PairWorld(World):
    """Pairs of images of the synthetic world, created before the run if missing."""

    folder: str = "runs/world-pairs"
    train: int = 2500
    """Number of training sets, of four pairs each."""
    held_out: int = 150
    """Number of sets in each of val and test."""

    def write(self, split: str, count: int) -> object:
        return world_pairs.write(self.folder, split, count, size=self.image_size)


@dataclass(frozen=True)
class NlvrRun(FineTuneRun):
    """An NLVR run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    data: NlvrData = field(default_factory=NlvrData)
    validation: HeldOutSentences | None = None
    """Held-out set of every evaluation; the model with the best accuracy is kept. If unset, the last model is kept."""
    test: HeldOutSentences | None = None
    world: PairWorld | None = None


def judge(run: NlvrRun) -> tuple[Result, Path]:
    """Fine-tune an NLVR model; returns what `fine_tune` does."""
    dist.start(run.train.timeout)
    if run.world:  # before the sources are opened: the model has one branch per image of an example
        run.world.draw()
    sources = open_sentences(run.data)
    if not sources:
        raise DataError("no data: give at least one source")
    images = sources[0].count
    model, tokenizer = build_task(Nlvr, run.model, run.train.seed, images=images)
    transform = TrainTransform(model.vision.image_size, run.data)
    data = feed_of(sources, PrepareSentences(transform, tokenizer, run.data), run.train.seed)
    held_out = open_evaluations(run, NlvrEvaluation, images, tokenizer)
    about = f"Decides whether a sentence is true of several images; trained {run.model.origin} with `recipes.nlvr`."
    best = BestModel(run, tokenizer, held_out, by="accuracy", about=about)
    return fine_tune(run, NlvrObjective(model), data, best)


class NlvrEvaluation(Evaluation):
    """Accuracy on labelled sentences."""

    def __init__(self, name: str, held_out: HeldOutSentences, images: int, tokenizer: Tokenizer) -> None:
        """Open the sentences. Raises DataError for missing images, a missing label, or another number of images."""
        source = Sentences(held_out.source)
        source.check_some_exist()
        self.examples, self.tokenizer = source.examples[: held_out.limit], tokenizer
        if source.count != images:
            raise DataError(
                f"{name}.source {held_out.source.path} has {source.count} images per row; expected {images}, as in data"
            )
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
