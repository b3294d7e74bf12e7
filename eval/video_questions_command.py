"""`python -m eval video_questions`: how often a model of images and questions answers right about videos."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from blip import atomic, dist
from blip.commands.loading import load
from blip.tasks.answering import load_candidates
from blip.tasks.vqa import Vqa
from eval.clips import read_questions
from eval.options import VideoQuestions
from eval.video_questions import accuracy, answers_about_clips


def run(options: VideoQuestions) -> dict[str, float]:
    """Measure, print and, with `out`, write scores.json and results.json; returns the accuracies in percent."""
    dist.start()
    file = Path(options.questions).expanduser()
    root = Path(options.video_root).expanduser() if options.video_root else file.parent
    clips, questions = read_questions(file, root.absolute())
    clips = clips[: options.limit]
    questions = [question for question in questions if question.clip < len(clips)]
    loaded = load(options.model, options.device, options.precision, Vqa)
    candidates = load_candidates(options.candidates, options.model, options.method, loaded.tokenizer)
    ways = {"frames": options.frames, "batch": options.batch, "progress": True}
    with loaded.computing():
        said = answers_about_clips(
            loaded.model, loaded.tokenizer, clips, questions, options.answers, candidates, **ways
        )
    words = [one.words for one in said]
    found = accuracy(questions, words)
    if not dist.is_main():
        return found
    for name, value in found.items():
        print(f"{name:<24}{value:7.2f}")
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": question.id, "video_id": clips[question.clip].id, "question": question.question, "answer": answer}
            for question, answer in zip(questions, words, strict=True)
        ]
        settings = {name: getattr(options, name) for name in ("model", "frames", "candidates", "method")}
        counts = {"videos": len(clips), "questions": len(questions), "questions_file": options.questions}
        settings |= {"answers": dataclasses.asdict(options.answers)}
        lines = ",\n".join(map(json.dumps, rows))
        atomic.replace_file(out / "results.json", f"[\n{lines}\n]\n".encode())
        atomic.replace_file(out / "scores.json", (json.dumps(found | counts | settings, indent=1) + "\n").encode())
    return found
