"""`blip-eval vqa`: from a model and questions, or from answers that are there, to the official accuracy."""

from __future__ import annotations

from pathlib import Path

from blip import dist
from blip.app.candidates import load_candidates
from blip.app.loaded import load
from blip.data.prepare.questions import Id, Questions
from blip.models.vqa import Vqa
from eval.options import Vqa as Options
from eval.results_folder import ResultsFolder, settings_of
from eval.vqa import QuestionSet, Scores, answers_of, evalai_results, read_results, score


def run(options: Options) -> Scores | None:
    """Answer what is asked for, score it and leave files; returns the scores in the main process.

    None where nobody's answers are known, as in VQA v2's test sets, and in the other processes.
    """
    dist.start()
    source = Questions(options.source)
    out = ResultsFolder(options.out)
    questions = [source.question(row) for row in range(len(source))][: options.limit]
    results = _answered(options, source) if options.model else read_results(Path(options.results))
    if not dist.is_main():
        return None
    if options.model:
        out.write("results.json", evalai_results(results))
    if options.model and not any(question.answers for question in questions):
        print(f"{len(results)} answers are in {out / 'results.json'}; without people's there is nothing to score")
        return None
    given = {"resamples": options.resamples, "seed": options.seed, "allow_partial": options.allow_partial}
    scores = score(questions, results, **given)
    print(table(scores))
    if out.where:
        out.write_scores(scores.record(), _settings(options))
        print(f"{'results.json and ' * bool(options.model)}scores.json are in {out.where}")
    return scores


def _answered(options: Options, source: Questions) -> dict[Id, str]:
    asked = QuestionSet(source, options.limit)
    loaded = load(options.model, options.device, options.precision, Vqa)
    candidates = load_candidates(options.candidates, options.model, options.method, loaded.tokenizer)
    ways = {"batch": options.batch, "threads": options.threads}
    with loaded.computing():
        found = answers_of(loaded.model, loaded.tokenizer, asked, options.answers, candidates, **ways)
    return {name: said.words for name, said in found.items()}


def _settings(options: Options) -> dict[str, object]:
    """What the scores depend on, for the record."""
    names = ("model", "candidates", "method", "answers", "limit") if options.model else ("results", "limit")
    return settings_of(options, *names, "resamples", "seed", "source")


def table(scores: Scores) -> str:
    """Scores for people, times 100 as papers print them."""
    left = f"; {scores.missing} without a result are left out" if scores.missing else ""
    lines = [f"{scores.questions} questions{left}"]
    interval = ""
    if scores.accuracy_low is not None:
        interval = f"   95% {100 * scores.accuracy_low:6.2f} to {100 * scores.accuracy_high:6.2f}"
    lines.append(f"{'accuracy':<28}{100 * scores.accuracy:7.2f}{interval}")
    for kinds in (scores.by_answer_type, scores.by_question_type):
        lines += [f"  {kind[:25]:<26}{100 * value:7.2f}" for kind, value in kinds.items()]
    return "\n".join(lines)
