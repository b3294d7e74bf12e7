"""Question answering about clips with a model of images and questions, without training on videos (section 5.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blip.errors import DataError
from blip.inference.answering import Answer, Candidates, answers, ask
from blip.inference.settings import QUESTION_WORDS, AnswerConfig
from blip.models.video import FRAMES, clip_tokens
from blip.models.vqa import Vqa
from blip.text import clean_question
from blip.tokenizer import Tokenizer
from eval.clips import Clip, Question, batches
from eval.metrics.vqa import normalise
from eval.parallel import spread

_AT_ONCE = 64
"""Questions answered together."""


def answers_about_clips(
    model: Vqa,
    tokenizer: Tokenizer,
    clips: Sequence[Clip],
    questions: Sequence[Question],
    config: AnswerConfig,
    candidates: Candidates | None = None,
    *,
    frames: int = FRAMES,
    batch: int = 4,
    threads: int = 2,
) -> list[Answer]:
    """Answer each question over the tokens of all its clip's frames: by the best candidate, or by search.

    All processes have to call it; they share the clips, and each returns all answers in the order of the questions.
    DataError, in every process, for a clip that cannot be read or a question without words.
    """
    texts = [clean_question(question.question, QUESTION_WORDS) for question in questions]
    for question, text in zip(questions, texts, strict=True):
        if not text:
            raise DataError(f"question {question.id} about video {clips[question.clip].id} has no words")
    rows_of: list[list[int]] = [[] for _ in clips]
    for row, question in enumerate(questions):
        rows_of[question.clip].append(row)
    device, training = next(model.parameters()).device, model.training
    if candidates:
        candidates.to(device)

    @torch.no_grad()
    def work(numbers: Sequence[int]) -> list[tuple[int, Answer]]:
        (shown,) = batches(clips, numbers, len(numbers), frames, model.config.vision.image_size, threads)
        tokens = clip_tokens(model.vision, shown.to(device))
        rows = [(row, place) for place, number in enumerate(numbers) for row in rows_of[number]]
        found: list[tuple[int, Answer]] = []
        for part in (rows[i : i + _AT_ONCE] for i in range(0, len(rows), _AT_ONCE)):
            places = [place for _, place in part]
            context = ask(model, tokenizer, tokens, [texts[row] for row, _ in part], places)
            said = answers(model, tokenizer, context, config, candidates)
            found += [(row, one) for (row, _), (one,) in zip(part, said, strict=True)]
        return found

    asked = [number for number, rows in enumerate(rows_of) if rows]
    model.eval()
    try:
        parts = [asked[i : i + batch] for i in range(0, len(asked), batch)]
        found = spread(parts, work, what="answer")
    finally:
        model.train(training)
    return [said for _, said in sorted(found)]


def accuracy(questions: Sequence[Question], given: Sequence[str]) -> dict[str, float]:
    """Share of answers that are the right one, in percent: all, and by a question's first word (what, who, how...).

    Spelling is evened out on both sides as in VQA's official accuracy.
    """
    right: dict[str, list[bool]] = {}
    for question, said in zip(questions, given, strict=True):
        hit = normalise(said) == normalise(question.answer)
        for kind in ("accuracy", f"accuracy_{clean_question(question.question, 1)}"):
            right.setdefault(kind, []).append(hit)
    return {kind: 100 * sum(hits) / len(hits) for kind, hits in right.items()}
