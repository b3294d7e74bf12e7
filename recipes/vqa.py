"""Fine-tune a model that answers questions about images; keep the best epoch by accuracy (paper, section 5.3).

    accelerate launch -m recipes.vqa --config recipes/configs/vqa_world.yaml                # 2 cores
    torchrun --nproc_per_node 8 -m recipes.vqa --config recipes/configs/vqa_v2.yaml --out runs/vqa

Repeat the command to continue an interrupted run. Each config states machine, time and score.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip.data.prepare.questions import Id, PrepareQuestions, Questions, QuestionShards, open_questions, read_answers
from blip.data.settings import ImageQuestions
from blip.data.transforms import TrainTransform
from blip.errors import DataError, counted
from blip.inference.answering import ANSWERS, Candidates, answers, encode_questions
from blip.inference.settings import QUESTION_TOKENS, QUESTION_WORDS, AnswerConfig
from blip.models.vqa import Vqa
from blip.objectives.vqa import VqaConfig, VqaObjective
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.world import questions
from eval.vqa import QuestionSet, answers_of, evalai_results, score
from recipes import command
from recipes.building import TaskData, WorldChoice, feed_of
from recipes.run import BestModel, Evaluation, FineTuneRun, HeldOut, begin, fine_tune, open_evaluations

Answers = dict[Id, str]
"""Answers of a model, by question."""


@dataclass(frozen=True)
class VqaData(TaskData):
    """Training data of a VQA model."""

    sources: list[ImageQuestions] = field(default_factory=list)
    max_words: int = QUESTION_WORDS
    """Most words of a question; the rest is cut off."""
    max_tokens: int = QUESTION_TOKENS
    """Most word pieces of a question, first and last special tokens included; the rest is cut off."""

    samples = "questions"


@dataclass(frozen=True)
class HeldOutQuestions(HeldOut):
    """Questions that are not trained on."""

    source: ImageQuestions
    """Source of the questions."""


@dataclass(frozen=True)
class QuestionWorld(WorldChoice):
    """Images of the synthetic world with questions, created before the run if missing."""

    def __post_init__(self) -> None:
        if self.web:
            raise ValueError("world.web applies to captions only: questions have true answers; leave it out")

    def file(self, split: str) -> str:
        return questions.files(split)[1]

    def write(self, split: str, count: int) -> object:
        return questions.write(self.folder, split, count, size=self.image_size, workers=self.workers)


@dataclass(frozen=True)
class VqaRun(FineTuneRun):
    """A VQA run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    data: VqaData = field(default_factory=VqaData)
    objective: VqaConfig = field(default_factory=VqaConfig)
    """Settings of the loss."""
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    """How held-out questions are answered; the model with the best accuracy is kept."""
    candidates: str | None = None
    """File of answers to choose from, a JSON list or one per line; the sources' most common ones by default."""
    common: int = 3000
    """Number of most common answers to choose from; 0 generates answers freely instead."""
    validation: HeldOutQuestions | None = None
    test: HeldOutQuestions | None = None
    world: QuestionWorld | None = None

    def __post_init__(self) -> None:
        if self.common < 0:
            raise ValueError(f"common must be 0 or more, got {self.common}")


def answer(run: VqaRun) -> tuple[Result, Path]:
    """Fine-tune a VQA model; returns what `fine_tune` does."""
    model, tokenizer = begin(run, Vqa)
    sources = open_questions(run.data)
    prepare = PrepareQuestions(TrainTransform(model.vision.image_size, run.data), tokenizer, run.data)
    data = feed_of(sources, prepare, run.train.seed)
    choices = chosen(run, sources, tokenizer)
    candidates = Candidates(choices, tokenizer) if choices else None
    held_out = open_evaluations(run, VqaEvaluation, run.answers, candidates, model, tokenizer)
    about = f"Answers questions about images; trained {run.model.origin} with `recipes.vqa`."
    beside = {ANSWERS: json.dumps(choices, indent=0) + "\n"} if choices else {}
    best = BestModel(run, tokenizer, held_out, by="accuracy", about=about, beside=beside)
    return fine_tune(run, VqaObjective(model, run.objective), data, best)


def chosen(run: VqaRun, sources: Sequence[Questions | QuestionShards], tokenizer: Tokenizer) -> list[str]:
    """The answers to choose from, sorted; none if answers are generated freely.

    Answers with words unknown to the tokenizer are left out of the sources' most common ones.
    """
    if run.candidates:
        return sorted(set(read_answers(Path(run.candidates))))
    counts = sum((source.answers() for source in sources), Counter())
    common = sorted(counts, key=lambda answer: (-counts[answer], answer))[: run.common]
    return sorted(answer for answer in common if answer.strip() and not tokenizer.unknown_rate([answer]))


class VqaEvaluation(Evaluation):
    """VQA accuracy on questions with human answers."""

    def __init__(
        self,
        name: str,
        held_out: HeldOutQuestions,
        config: AnswerConfig,
        candidates: Candidates | None,
        model: Vqa,
        tokenizer: Tokenizer,
    ) -> None:
        """Open the questions, and try the first one on a blank image.

        Raises DataError for missing images or a question without answers, ValueError for lengths that do not fit the
        model.
        """
        self.question_set = QuestionSet(Questions(held_out.source), held_out.limit)
        self.config, self.candidates, self.tokenizer = config, candidates, tokenizer
        if bare := [question.id for question in self.question_set.questions if not question.answers]:
            these = counted(bare, "question")
            raise DataError(f"{name}.source {held_out.source.path}: no answers to {these}; give annotations")
        self.question_set.images.image(0)
        side = model.vision.image_size
        with torch.no_grad():
            tokens = model.eval().vision(torch.zeros(1, 3, side, side))
            answers(
                model,
                tokenizer,
                encode_questions(model, tokenizer, tokens, self.question_set.texts[:1], [0]),
                config,
                candidates,
            )

    def answers(self, model: Vqa) -> Answers:
        answered = answers_of(model, self.tokenizer, self.question_set, self.config, self.candidates)
        return {name: answer.text for name, answer in answered.items()}

    def scores(self, answers: Answers) -> dict[str, float]:
        return score(self.question_set.questions, answers, resamples=0).named()

    def files(self, name: str, answers: Answers) -> dict[str, str]:
        return {f"results-{name}.json": evalai_results(answers)}


def main() -> None:
    answer(command.read(VqaRun))


if __name__ == "__main__":
    command.run(main)
