"""Video question answering with an image VQA model, without training on videos (section 5.6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from blip import dist
from blip.app.candidates import load_candidates
from blip.errors import DataError
from blip.inference.answering import Answer, Candidates, answers, encode_questions
from blip.inference.settings import QUESTION_WORDS, AnswerConfig
from blip.models.video import FRAMES, clip_tokens
from blip.models.vqa import Vqa
from blip.text import clean_question
from blip.tokenizer import Tokenizer
from eval.clips import ClipQuestion, VideoClip, batches, read_questions
from eval.metrics.vqa import normalise
from eval.options import VideoQuestionsOptions
from eval.runner import Runner, evaluating, in_parts, listed, spread

_AT_ONCE = 64
"""Questions answered together."""


def evaluate(options: VideoQuestionsOptions, runner: Runner) -> Iterator[tuple[str, float]]:
    """Evaluate a model; writes results.json, its answers."""
    file = Path(options.questions).expanduser()
    root = Path(options.video_root).expanduser() if options.video_root else file.parent
    clips, questions = read_questions(file, root.absolute())
    clips = clips[: options.limit]
    questions = [question for question in questions if question.clip < len(clips)]
    with runner.model(Vqa) as loaded:
        candidates = load_candidates(options.candidates, options.model, options.method, loaded.tokenizer)
        given = (loaded.model, loaded.tokenizer, clips, questions, options.answers, candidates)
        answered = answers_about_clips(*given, frames=options.frames, batch=options.batch)
    if not dist.is_main():
        return
    words = [answer.text for answer in answered]
    rows = [
        {"id": question.id, "video_id": clips[question.clip].id, "question": question.question, "answer": answer}
        for question, answer in zip(questions, words, strict=True)
    ]
    runner.out.write("results.json", listed(rows))
    counts = {"videos": len(clips), "questions": len(questions), "questions_file": options.questions}
    runner.record("model", "frames", "candidates", "method", "answers", **counts)
    runner.times = 1
    yield from accuracy(questions, words).items()


# Answers --------------------------------------------------------------------------------------------------------------


def answers_about_clips(
    model: Vqa,
    tokenizer: Tokenizer,
    clips: Sequence[VideoClip],
    questions: Sequence[ClipQuestion],
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
    device = next(model.parameters()).device
    if candidates:
        candidates.to(device)

    def work(numbers: Sequence[int]) -> list[tuple[int, Answer]]:
        (shown,) = batches(clips, numbers, len(numbers), frames, model.config.vision.image_size, threads)
        tokens = clip_tokens(model.vision, shown.to(device, non_blocking=True))
        rows = [(row, place) for place, number in enumerate(numbers) for row in rows_of[number]]
        answered: list[tuple[int, Answer]] = []
        for part in in_parts(rows, _AT_ONCE):
            places = [place for _, place in part]
            context = encode_questions(model, tokenizer, tokens, [texts[row] for row, _ in part], places)
            best = answers(model, tokenizer, context, config, candidates)
            answered += [(row, answer) for (row, _), (answer,) in zip(part, best, strict=True)]
        return answered

    with_questions = [number for number, rows in enumerate(rows_of) if rows]
    with evaluating(model):
        answered = spread(in_parts(with_questions, batch), work, what="answer")
    return [answer for _, answer in sorted(answered)]


# Scores ---------------------------------------------------------------------------------------------------------------


def accuracy(questions: Sequence[ClipQuestion], given: Sequence[str]) -> dict[str, float]:
    """Percentage of right answers: of all, and by a question's first word (what, who, how...).

    Spelling is evened out on both sides as in VQA's official accuracy.
    """
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, given, strict=True):
        hit = normalise(answer) == normalise(question.answer)
        for kind in ("accuracy", f"accuracy_{clean_question(question.question, 1)}"):
            right.setdefault(kind, []).append(hit)
    return {kind: 100 * sum(hits) / len(hits) for kind, hits in right.items()}
