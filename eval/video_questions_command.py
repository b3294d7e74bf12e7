"""`blip-eval video_questions`: how often a model of images and questions answers right about videos."""

from __future__ import annotations

from pathlib import Path

from blip import dist
from blip.app.candidates import load_candidates
from blip.app.loaded import load
from blip.models.vqa import Vqa
from eval.clips import read_questions
from eval.options import VideoQuestions
from eval.results_folder import ResultsFolder, listed, settings_of, show
from eval.video_questions import accuracy, answers_about_clips


def run(options: VideoQuestions) -> dict[str, float]:
    """Measure, print and, with `out`, write scores.json and results.json; returns the accuracies in percent."""
    dist.start()
    out = ResultsFolder(options.out)
    file = Path(options.questions).expanduser()
    root = Path(options.video_root).expanduser() if options.video_root else file.parent
    clips, questions = read_questions(file, root.absolute())
    clips = clips[: options.limit]
    questions = [question for question in questions if question.clip < len(clips)]
    loaded = load(options.model, options.device, options.precision, Vqa)
    candidates = load_candidates(options.candidates, options.model, options.method, loaded.tokenizer)
    ways = {"frames": options.frames, "batch": options.batch}
    with loaded.computing():
        said = answers_about_clips(
            loaded.model, loaded.tokenizer, clips, questions, options.answers, candidates, **ways
        )
    words = [one.words for one in said]
    found = accuracy(questions, words)
    if not dist.is_main():
        return found
    show(found, 24)
    rows = [
        {"id": question.id, "video_id": clips[question.clip].id, "question": question.question, "answer": answer}
        for question, answer in zip(questions, words, strict=True)
    ]
    counts = {"videos": len(clips), "questions": len(questions), "questions_file": options.questions}
    out.write("results.json", listed(rows))
    out.write_scores(found, counts, settings_of(options, "model", "frames", "candidates", "method", "answers"))
    return found
