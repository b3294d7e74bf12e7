"""`python -m eval nlvr2` and `python -m eval nlvr`: from a model and examples, or from answers, to scores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from blip import atomic, dist
from blip.commands.loading import load
from blip.data.nlvr import Sentences
from blip.tasks.nlvr import Nlvr
from eval.nlvr import answers_of, read_results, results_csv, score
from eval.options import Nlvr as Options


def run(options: Options) -> dict[str, float] | None:
    """Answer what is asked for, score it and leave files; returns the scores in the main process.

    None where the examples have no labels, as in a hidden test set, and in the other processes.
    """
    dist.start()
    source = Sentences(options.source)
    examples = source.examples[: options.limit]
    out = Path(options.out) if options.out else None
    if out:
        out.mkdir(parents=True, exist_ok=True)  # before hours of work
    if options.model:
        source.check_some_exist()
        loaded = load(options.model, options.device, options.precision, Nlvr)
        with loaded.computing():
            answers = answers_of(loaded.model, loaded.tokenizer, examples, batch=options.batch, progress=True)
    else:
        answers = read_results(Path(options.results))
    if not dist.is_main():
        return None
    if out and options.model:
        _replace(out / "results.csv", results_csv(examples, answers))
    if options.model and all(example.label is None for example in examples):
        print(f"{len(answers)} answers are in {out / 'results.csv'}; without labels there is nothing to score")
        return None
    given = {"resamples": options.resamples, "seed": options.seed, "allow_partial": options.allow_partial}
    scores = score(examples, answers, **given)
    counted = sum(example.id in answers for example in examples)
    _print(scores, counted, len(examples), len(answers) - counted)
    if out:
        _replace(out / "scores.json", json.dumps(scores | _settings(options, counted), indent=1) + "\n")
    return scores


def _print(scores: dict[str, float], counted: int, examples: int, others: int) -> None:
    print(f"{counted} examples" + (f" of {examples}; the others have no answer" if counted < examples else ""))
    if others:
        print(f"{others} answers for other examples were left out")
    for name in ("accuracy", "consistency", "majority"):
        ends = [scores.get(name + end) for end in ("_low", "_high")]
        interval = f"   95% {100 * ends[0]:6.2f} to {100 * ends[1]:6.2f}" if None not in ends else ""
        print(f"{name:<16}{100 * scores[name]:7.2f}{interval}")


def _settings(options: Options, examples: int) -> dict[str, object]:
    """What the scores depend on, for the record."""
    names = ("model", "results", "limit", "resamples", "seed")
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {"examples": examples, **said, "source": dataclasses.asdict(options.source)}


def _replace(path: Path, content: str) -> None:
    atomic.replace_file(path, content.encode())
