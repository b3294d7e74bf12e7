"""Visual question answering: a model's answers, and their score by the official metric (paper, section 5.3).

`answers_of(model, tokenizer, source, config, candidates)` answers each question of a
`blip.data.prepare.questions.Questions`, `score(source, answers).accuracy` scores the answers. Q questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip import dist
from blip.app.candidates import load_candidates
from blip.data.prepare.questions import Id, Question, Questions, load
from blip.errors import BadSample, DataError, counted
from blip.inference.answering import Answer, Candidates, answers, encode_questions
from blip.inference.settings import QUESTION_WORDS, AnswerConfig
from blip.models.vqa import Vqa
from blip.text import clean_question
from blip.tokenizer import Tokenizer
from eval.images import Images
from eval.metrics.vqa import accuracy
from eval.options import VqaOptions
from eval.references import ImageCaptions
from eval.runner import Runner, evaluating, in_parts, listed, spread

_AT_ONCE = 64
"""Number of questions answered together."""


def evaluate(options: VqaOptions, runner: Runner) -> Iterator[tuple[str, float | None]]:
    """Evaluate answers of a model or a file; writes results.json, the answers of the model."""
    source = Questions(options.source)
    questions = [source.question(row) for row in range(len(source))][: options.limit]
    if options.model:
        question_set = QuestionSet(source, options.limit)
        with runner.model(Vqa) as loaded:
            candidates = load_candidates(options.candidates, options.model, options.method, loaded.tokenizer)
            ways = {"batch": options.batch, "threads": options.threads}
            answered = answers_of(loaded.model, loaded.tokenizer, question_set, options.answers, candidates, **ways)
        results = {name: answer.text for name, answer in answered.items()}
    else:
        results = read_results(Path(options.results))
    if not dist.is_main():
        return
    if options.model:
        runner.out.write("results.json", evalai_results(results))
        if not any(question.answers for question in questions):
            return runner.unscored("results.json", "human answers")
    given = {"resamples": options.resamples, "seed": options.seed, "allow_partial": options.allow_partial}
    scores = score(questions, results, **given)
    print(f"{scores.questions} questions" + f"; {scores.missing} without a result are left out" * bool(scores.missing))
    for kind, value in (*scores.by_question_type.items(), *scores.by_answer_type.items()):
        print(f"  {kind[:21]:<22}{100 * value:7.2f}")
    record = asdict(scores)
    yield from [(name, record.pop(name)) for name in ("accuracy", "accuracy_low", "accuracy_high")]
    names = ("model", "candidates", "method", "answers", "limit") if options.model else ("results", "limit")
    runner.record(*names, "resamples", "seed", "source", **record)


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VqaScores:
    """Accuracies as fractions (papers print 100 times as much), and their provenance."""

    accuracy: float
    accuracy_low: float | None
    """Lower end of its 95% interval: a percentile bootstrap over questions; None without resampling."""
    accuracy_high: float | None
    by_answer_type: dict[str, float]
    """Accuracy by answer type (yes/no, number, other), if the data has types."""
    by_question_type: dict[str, float]
    questions: int
    """Number of questions scored."""
    missing: int
    """Number of questions without a result that were left out."""
    counts: dict[str, int]
    """Questions of each answer type."""

    def named(self) -> dict[str, float]:
        """The accuracy, and that of each answer type."""
        return {"accuracy": self.accuracy} | {f"accuracy_{kind}": value for kind, value in self.by_answer_type.items()}


def score(
    questions: Sequence[Question],
    results: Mapping[Id, str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    allow_partial: bool = False,
) -> VqaScores:
    """Score one answer a question against its annotators' answers.

    DataError if the ids do not match, unless `allow_partial` and only results are missing, or there are no answers.
    """
    known = {question.id for question in questions}
    if not results:
        raise DataError("there are no results to score")
    if unknown := [name for name in results if name not in known]:
        these = counted(unknown, "question")
        raise DataError(f"results for {these} that are not among the questions; are they of another split?")
    missing = [question.id for question in questions if question.id not in results]
    if missing and not allow_partial:
        these = counted(missing, "question")
        raise DataError(f"no results for {these} of {len(questions)}; give all, or allow_partial to score the others")
    scored = [question for question in questions if question.id in results]
    if bare := [question.id for question in scored if not question.answers]:
        raise DataError(f"no annotators' answers to {counted(bare, 'question')}; nothing can be compared with them")
    right = np.array([accuracy(results[question.id], question.answers) for question in scored])
    low, high = _interval(right, resamples, seed)
    kinds = {
        name: _by([getattr(question, name) for question in scored], right) for name in ("answer_type", "question_type")
    }
    counts = {kind: sum(question.answer_type == kind for question in scored) for kind in kinds["answer_type"]}
    return VqaScores(
        float(right.mean()), low, high, kinds["answer_type"], kinds["question_type"], len(scored), len(missing), counts
    )


def _by(kinds: Sequence[str], right: np.ndarray) -> dict[str, float]:
    names = np.array(kinds)
    return {str(kind): float(right[names == kind].mean()) for kind in sorted(set(kinds)) if kind}


def _interval(right: np.ndarray, resamples: int, seed: int) -> tuple[float | None, float | None]:
    if not resamples:
        return None, None
    draw = np.random.default_rng(seed)
    means = [right[draw.integers(len(right), size=len(right))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def read_results(path: Path) -> dict[Id, str]:
    """Read results as EvalAI expects them, [{"question_id": ..., "answer": ...}]. DataError for anything else."""
    rows, expected = load(path), 'expected [{"question_id": ..., "answer": ...}, ...]'
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} is {'empty' if rows == [] else 'not a list'}; {expected}")
    results: dict[Id, str] = {}
    repeated: list[Id] = []
    for number, row in enumerate(rows):
        name, answer = (row.get("question_id"), row.get("answer")) if isinstance(row, dict) else (None, None)
        if isinstance(name, bool) or not isinstance(name, int | str) or not isinstance(answer, str):
            raise DataError(f"{path}: row {number} is {json.dumps(row)[:80]}; {expected}")
        name = int(name) if isinstance(name, str) and name.isascii() and name.isdigit() else name
        if name in results:
            repeated.append(name)
        results[name] = answer
    if repeated:
        raise DataError(f"{path}: {counted(repeated, 'question')} more than once; expected one answer a question")
    return results


def evalai_results(answers: Mapping[Id, str]) -> str:
    """Format answers as EvalAI's server expects them."""
    return listed([{"question_id": name, "answer": answer} for name, answer in answers.items()])


# Answers --------------------------------------------------------------------------------------------------------------


class QuestionSet:
    """The first `limit` questions of a source with their images, each image once."""

    def __init__(self, source: Questions, limit: int | None = None) -> None:
        """DataError if no image is there, or a question has no words."""
        source.check_some_exist()
        self.where = source.config.path
        self.questions = [source.question(row) for row in range(min(limit or len(source), len(source)))]
        self.texts = [clean_question(question.text, QUESTION_WORDS) for question in self.questions]
        for row, text in enumerate(self.texts):
            if not text:
                raise DataError(f"{source.key(row)}: the question {self.questions[row].text[:40]!r} has no words")
        self._of: dict[str, list[int]] = {}
        for row, question in enumerate(self.questions):
            self._of.setdefault(question.image, []).append(row)
        first = [rows[0] for rows in self._of.values()]

        def image(number: int) -> Any:
            try:
                return source[first[number]].image
            except BadSample as error:
                raise DataError(f"{source.key(first[number])}: {error.reason}") from None

        self.images = Images([ImageCaptions(name, [], name) for name in self._of], image, self.where)

    def of(self, image: str) -> list[int]:
        """Rows of the questions about an image."""
        return self._of[image]


def answers_of(
    model: Vqa,
    tokenizer: Tokenizer,
    question_set: QuestionSet,
    config: AnswerConfig,
    candidates: Candidates | None = None,
    *,
    batch: int = 16,
    threads: int = 2,
) -> dict[Id, Answer]:
    """Answer each question: by the best candidate, or without any by search. All processes share the work.

    All processes have to call it, and each returns all answers in the order of the questions. `batch` images go
    through the model at once. DataError, in every process, if an image cannot be read.
    """
    device, side = next(model.parameters()).device, model.config.vision.image_size
    if candidates:
        candidates.to(device)

    def work(rows: Sequence[int]) -> list[tuple[int, Answer]]:
        read = list(question_set.images.batches(rows, -(-len(rows) // threads), side, threads))
        names = [name for names, _ in read for name in names]
        tokens = model.vision(torch.cat([views for _, views in read]).to(device, non_blocking=True))
        about = [(row, place) for place, name in enumerate(names) for row in question_set.of(name)]
        answered: list[tuple[int, Answer]] = []
        for part in in_parts(about, _AT_ONCE):
            texts = [question_set.texts[row] for row, _ in part]
            context = encode_questions(model, tokenizer, tokens, texts, [place for _, place in part])
            best = answers(model, tokenizer, context, config, candidates)
            answered += [(row, answer) for (row, _), (answer,) in zip(part, best, strict=True)]
        return answered

    with evaluating(model):
        answered = spread(in_parts(range(len(question_set.images)), batch), work, what="answer")
    return {question_set.questions[row].id: answer for row, answer in sorted(answered)}
