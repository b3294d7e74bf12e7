"""`blip-eval nlvr2` and `blip-eval nlvr`: from a model and examples, or from answers, to scores."""

from __future__ import annotations

from pathlib import Path

from blip import dist
from blip.app.loaded import load
from blip.data.prepare.sentences import Sentences
from blip.models.nlvr import Nlvr
from eval.nlvr import answers_of, read_results, results_csv, score
from eval.options import Nlvr as Options
from eval.results_folder import ResultsFolder, interval, settings_of


def run(options: Options) -> dict[str, float] | None:
    """Answer what is asked for, score it and leave files; returns the scores in the main process.

    None where the examples have no labels, as in a hidden test set, and in the other processes.
    """
    dist.start()
    source = Sentences(options.source)
    examples = source.examples[: options.limit]
    out = ResultsFolder(options.out)
    if options.model:
        source.check_some_exist()
        loaded = load(options.model, options.device, options.precision, Nlvr)
        with loaded.computing():
            answers = answers_of(loaded.model, loaded.tokenizer, examples, batch=options.batch)
    else:
        answers = read_results(Path(options.results))
    if not dist.is_main():
        return None
    if options.model:
        out.write("results.csv", results_csv(examples, answers))
    if options.model and all(example.label is None for example in examples):
        print(f"{len(answers)} answers are in {out / 'results.csv'}; without labels there is nothing to score")
        return None
    given = {"resamples": options.resamples, "seed": options.seed, "allow_partial": options.allow_partial}
    scores = score(examples, answers, **given)
    counted = sum(example.id in answers for example in examples)
    _print(scores, counted, len(examples), len(answers) - counted)
    settings = settings_of(options, "model", "results", "limit", "resamples", "seed", "source")
    out.write_scores(scores, {"examples": counted}, settings)
    return scores


def _print(scores: dict[str, float], counted: int, examples: int, others: int) -> None:
    print(f"{counted} examples" + (f" of {examples}; the others have no answer" if counted < examples else ""))
    if others:
        print(f"{others} answers for other examples were left out")
    for name in ("accuracy", "consistency", "majority"):
        print(f"{name:<16}{100 * scores[name]:7.2f}{interval(scores, name)}")
