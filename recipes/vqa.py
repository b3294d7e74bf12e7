"""Fine-tune a model that answers questions about pictures, and keep the best epoch by accuracy (paper, section 5.3).

    accelerate launch -m recipes.vqa --config recipes/configs/vqa_world.yaml                # 2 cores
    torchrun --nproc_per_node 8 -m recipes.vqa --config recipes/configs/vqa_v2.yaml --out runs/vqa

The same command again continues where the last one stopped. The configs say machine, time and score.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from blip import dist
from blip.data.loader import Feed
from blip.data.prepare.questions import Id, QuestionPairs, Questions, read_answers
from blip.data.settings import DataConfig, PictureQuestions
from blip.data.transforms import TrainTransform
from blip.errors import DataError, counted
from blip.inference.answering import ANSWERS, Candidates, answers, ask
from blip.inference.settings import QUESTION_TOKENS, QUESTION_WORDS, AnswerConfig
from blip.models.vqa import Vqa
from blip.objectives.vqa import Vqa as Objective
from blip.objectives.vqa import VqaConfig
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.train.settings import TrainConfig
from blip.world import questions
from eval.vqa import QuestionSet, answers_of, evalai_results, score
from recipes import command, keeping
from recipes.building import ModelChoice, WorldChoice, build_task, draw_splits

Answers = dict[Id, str]
"""What a model answers, by question."""


@dataclass(frozen=True)
class Data(DataConfig):
    """What the model is shown."""

    sources: list[PictureQuestions] = field(default_factory=list)
    """The sources of a run, mixed by weight."""
    max_words: int = QUESTION_WORDS
    """Words kept of a question."""
    max_tokens: int = QUESTION_TOKENS
    """Word pieces kept of a question, first and last special tokens included."""
    crop_scale_min: float = 0.5
    """Smallest share of the picture that a random crop shows; 1 shows the whole picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming or self.prompt.strip():
            raise ValueError("data.streaming and data.prompt are not for questions")


@dataclass(frozen=True)
class Held:
    """Questions that are not trained on."""

    source: PictureQuestions
    """Where they are."""
    limit: int | None = None
    """Questions to use, from the first on; all when not given."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}")


@dataclass(frozen=True)
class Run:
    """A run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, results.json, results-*.json, metrics.jsonl, checkpoints/, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model to fine-tune, usually `start_from` a pre-training run's."""
    data: Data = field(default_factory=Data)
    """What it is shown."""
    objective: VqaConfig = field(default_factory=VqaConfig)
    """The loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    """How held-out questions are answered."""
    candidates: str | None = None
    """File of the answers to choose from, a JSON list or one a line; the commonest of the sources when not given."""
    common: int = 3000
    """How many of the commonest; 0 to search for words instead of choosing."""
    validation: Held | None = None
    """Asked at every evaluation; the model with the best accuracy is kept. Without it the last model is."""
    test: Held | None = None
    """Asked once, at the end, of the model that was kept."""
    world: WorldChoice | None = None
    """Draw the embedded world and its questions first."""

    def __post_init__(self) -> None:
        if self.common < 0:
            raise ValueError(f"common must be 0 or more, got {self.common}")
        if self.world and self.world.web:
            raise ValueError("world.web is for captions: questions have true answers")


def answer(run: Run) -> tuple[Result, Path]:
    """Carry out a run; returns how it ended, with the scores of the model that was kept, and that model's folder.

    The scores are those of results.json: the validation's under their own names, the test's as `test_...`.
    """
    dist.start(run.train.timeout)
    if run.world:
        draw(run.world)
    model, tokenizer = build_task(Vqa, run.model, run.train.seed)
    sources = [Questions(source) for source in run.data.sources]
    transform = TrainTransform(model.vision.image_size, run.data)
    pairs = QuestionPairs(sources, transform, tokenizer, run.data, run.train.seed)
    choices = chosen(run, sources, tokenizer)
    given = run.answers, Candidates(choices, tokenizer) if choices else None, model, tokenizer
    validation = Exam("validation", run.validation, *given) if run.validation else None
    test = Exam("test", run.test, *given) if run.test else None
    kept = Kept(Path(run.out), tokenizer, run, choices)
    return keeping.fine_tune(
        Objective(model, run.objective), Feed(pairs), pairs.fingerprint(), run, kept, validation, test
    )


def draw(world: WorldChoice) -> None:
    """Write the questions, and the pictures, that are not there yet."""
    write = partial(questions.write, world.folder, size=world.image_size, workers=world.workers)
    draw_splits(world, write, file=lambda split: questions.files(split)[1])


def chosen(run: Run, sources: Sequence[Questions], tokenizer: Tokenizer) -> list[str]:
    """The answers to choose from, sorted; none where words are searched.

    Of the sources' commonest, those are left out that the tokenizer does not know in full.
    """
    if run.candidates:
        return sorted(set(read_answers(Path(run.candidates))))
    counts = sum((source.answers() for source in sources), Counter())
    common = sorted(counts, key=lambda answer: (-counts[answer], answer))[: run.common]
    return sorted(answer for answer in common if answer.strip() and not tokenizer.unknown_rate([answer]))


class Exam:
    """A held-out set: what a model answers, and how right that is."""

    def __init__(
        self,
        name: str,
        held: Held,
        config: AnswerConfig,
        candidates: Candidates | None,
        model: Vqa,
        tokenizer: Tokenizer,
    ) -> None:
        """Opens it, and answers a question about nothing, so that what does not fit is said before the training.

        Raises DataError for pictures that are not there, or a question that nobody answered; ValueError for lengths
        that do not fit the model.
        """
        self.asked = QuestionSet(Questions(held.source), held.limit)
        self.config, self.candidates, self.tokenizer = config, candidates, tokenizer
        if bare := [question.id for question in self.asked.questions if not question.answers]:
            these = counted(bare, "question")
            raise DataError(f"{name}.source {held.source.path}: no answers to {these}; give annotations")
        self.asked.pictures.picture(0)
        side = model.vision.image_size
        with torch.no_grad():
            tokens = model.eval().vision(torch.zeros(1, 3, side, side))
            answers(model, tokenizer, ask(model, tokenizer, tokens, self.asked.texts[:1], [0]), config, candidates)

    def answers(self, model: Vqa) -> Answers:
        """What the model answers; all processes share the work and each returns all."""
        found = answers_of(model, self.tokenizer, self.asked, self.config, self.candidates)
        return {name: said.words for name, said in found.items()}

    def scores(self, answers: Answers) -> dict[str, float]:
        """The official accuracy, as a fraction, and that of each type of answer."""
        return score(self.asked.questions, answers, resamples=0).named()


class Kept(keeping.Kept):
    """The model with the best accuracy, what it chooses from, and what it answered."""

    kind = Vqa
    selected_by = "accuracy"

    def __init__(self, out: Path, tokenizer: Tokenizer, run: Run, choices: list[str]) -> None:
        super().__init__(out, tokenizer, run)
        self.choices = choices

    def about(self, start: str) -> str:
        return f"Answers questions about pictures; trained {start} with `recipes.vqa`."

    def beside(self) -> dict[str, str]:
        return {ANSWERS: json.dumps(self.choices, indent=0) + "\n"} if self.choices else {}

    def written(self, name: str, answers: Answers) -> dict[str, str]:
        return {f"results-{name}.json": evalai_results(answers)}


def main() -> None:
    answer(command.read(Run))


if __name__ == "__main__":
    command.run(main)
