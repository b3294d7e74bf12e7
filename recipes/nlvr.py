"""Fine-tune a model that tells whether a sentence is true of several pictures, and keep the best epoch (section 5.4).

    accelerate launch -m recipes.nlvr --config recipes/configs/nlvr_world.yaml              # 2 cores
    torchrun --nproc_per_node 8 -m recipes.nlvr --config recipes/configs/nlvr2.yaml --out runs/nlvr2

The same command again continues where the last one stopped. The configs say machine, time and score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from blip import dist
from blip.data.loader import Feed
from blip.data.prepare.sentences import PictureSentencePairs, Sentences
from blip.data.settings import DataConfig, PictureSentences
from blip.data.transforms import TrainTransform
from blip.errors import DataError
from blip.models.nlvr import Nlvr
from blip.objectives.nlvr import Nlvr as Objective
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.train.settings import TrainConfig
from blip.world import pairs as world_pairs
from eval.nlvr import MAX_WORDS, answers_of, results_csv, score
from recipes import command, keeping
from recipes.building import ModelChoice, build_task, draw_splits

Answers = dict[str, bool]
"""What a model holds to be true, by example."""


@dataclass(frozen=True)
class Data(DataConfig):
    """What the model is shown."""

    sources: list[PictureSentences] = field(default_factory=list)
    """The sources of a run, mixed by weight."""
    max_words: int = MAX_WORDS
    """Words kept of a sentence."""
    max_tokens: int = 64
    """Word pieces kept of a sentence, first and last special tokens included."""
    crop_scale_min: float = 0.5
    """Smallest share of the picture that a random crop shows; 1 shows the whole picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming or self.prompt.strip():
            raise ValueError("data.streaming and data.prompt are not for sentences about several pictures")


@dataclass(frozen=True)
class Held:
    """Examples that are not trained on."""

    source: PictureSentences
    """Where they are."""
    limit: int | None = None
    """Examples to use, from the first on; all when not given."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}")


@dataclass(frozen=True)
class World:
    """Pairs of the embedded world, drawn to disk before a run unless they are there."""

    folder: str = "runs/world-pairs"
    """Where they go: FOLDER/train.json, FOLDER/val.json and FOLDER/test.json with their pictures."""
    train: int = 2500
    """Sets of training pairs; four pairs each."""
    held_out: int = 150
    """Sets of each of val and test."""
    image_size: int = 64
    """Side, pixels."""


@dataclass(frozen=True)
class Run:
    """A run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, results.json, results-*.csv, metrics.jsonl, checkpoints/, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model to fine-tune, usually `start_from` a pre-training run's."""
    data: Data = field(default_factory=Data)
    """What it is shown."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    validation: Held | None = None
    """Asked at every evaluation; the model with the best accuracy is kept. Without it the last model is."""
    test: Held | None = None
    """Asked once, at the end, of the model that was kept."""
    world: World | None = None
    """Draw the embedded world first."""


def judge(run: Run) -> tuple[Result, Path]:
    """Carry out a run; returns how it ended, with the scores of the model that was kept, and that model's folder.

    The scores are those of results.json: the validation's under their own names, the test's as `test_...`.
    """
    dist.start(run.train.timeout)
    if run.world:
        draw_splits(run.world, partial(world_pairs.write, run.world.folder, size=run.world.image_size))
    sources = [Sentences(source) for source in run.data.sources]
    if not sources:
        raise DataError("no data: give at least one source")
    images = sources[0].count
    model, tokenizer = build_task(Nlvr, run.model, run.train.seed, images=images)
    transform = TrainTransform(model.vision.image_size, run.data)
    pairs = PictureSentencePairs(sources, transform, tokenizer, run.data, run.train.seed)
    validation = Exam("validation", run.validation, images, tokenizer) if run.validation else None
    test = Exam("test", run.test, images, tokenizer) if run.test else None
    kept = Kept(Path(run.out), tokenizer, run, {"validation": validation, "test": test})
    return keeping.fine_tune(Objective(model), Feed(pairs), pairs.fingerprint(), run, kept, validation, test)


class Exam:
    """A held-out set: what a model holds to be true, and how often it is right."""

    def __init__(self, name: str, held: Held, images: int, tokenizer: Tokenizer) -> None:
        """Opens it, so that what does not fit is said before the training.

        Raises DataError for pictures that are not there, an example without a label, or another number of pictures.
        """
        source = Sentences(held.source)
        source.check_some_exist()
        self.examples, self.tokenizer = source.examples[: held.limit], tokenizer
        if source.count != images:
            raise DataError(f"{name}.source {held.source.path} has {source.count} pictures a row, data has {images}")
        if unknown := next((e for e in self.examples if e.label is None), None):
            raise DataError(f"{name}.source {held.source.path}: {unknown.key} has no label")

    def answers(self, model: Nlvr) -> Answers:
        """What the model holds to be true; all processes share the work and each returns all."""
        return answers_of(model, self.tokenizer, self.examples)

    def scores(self, answers: Answers) -> dict[str, float]:
        """Accuracy and consistency, as fractions, and the accuracy of the more frequent answer."""
        return score(self.examples, answers, resamples=0)


class Kept(keeping.Kept):
    """The model with the best accuracy, and what it answered."""

    kind = Nlvr
    selected_by = "accuracy"

    def __init__(self, out: Path, tokenizer: Tokenizer, run: Run, exams: dict[str, Exam | None]) -> None:
        super().__init__(out, tokenizer, run)
        self.exams = exams

    def about(self, start: str) -> str:
        return f"Tells whether a sentence is true of several pictures; trained {start} with `recipes.nlvr`."

    def written(self, name: str, answers: Answers) -> dict[str, str]:
        return {f"results-{name}.csv": results_csv(self.exams[name].examples, answers)}


def main() -> None:
    judge(command.read(Run))


if __name__ == "__main__":
    command.run(main)
