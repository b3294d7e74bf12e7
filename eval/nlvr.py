"""NLVR2 and NLVR: is a sentence true of some images (paper, section 5.4)?

`answers_of(model, tokenizer, examples)` classifies each example, `score(examples, answers)` computes accuracy
and consistency as the official scripts do. K images of an example, T text tokens.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from blip import dist
from blip.data.draws import Sample
from blip.data.formats.csv_rows import csv_records
from blip.data.images import own_fault
from blip.data.prepare.sentences import Example, Sentences, read_images, sentence_batch
from blip.data.settings import DataConfig
from blip.data.transforms import EvalTransform
from blip.errors import BadSample, DataError, counted
from blip.models.blip import starting_with
from blip.models.nlvr import Nlvr
from blip.nn import host
from blip.text import clean_caption
from blip.tokenizer import Tokenizer
from eval.options import NlvrOptions
from eval.runner import Runner, evaluating, in_parts, spread

MAX_WORDS = 40
"""Most words of a sentence."""


def evaluate(options: NlvrOptions, runner: Runner) -> Iterator[tuple[str, float]]:
    """Evaluate answers of a model or a file; writes results.csv, the answers of the model."""
    source = Sentences(options.source)
    examples = source.examples[: options.limit]
    if options.model:
        source.check_some_exist()
        with runner.model(Nlvr) as loaded:
            answers = answers_of(loaded.model, loaded.tokenizer, examples, batch=options.batch)
    else:
        answers = read_results(Path(options.results))
    if not dist.is_main():
        return
    if options.model:
        runner.out.write("results.csv", results_csv(examples, answers))
        if all(example.label is None for example in examples):
            return runner.unscored("results.csv", "labels")
    given = {"resamples": options.resamples, "seed": options.seed, "allow_partial": options.allow_partial}
    scores = score(examples, answers, **given)
    scored = sum(example.id in answers for example in examples)
    print(f"{scored} examples" + (f" of {len(examples)}; the others have no answer" if scored < len(examples) else ""))
    if others := len(answers) - scored:
        print(f"{others} answers for other examples were left out")
    runner.record("model", "results", "limit", "resamples", "seed", "source", examples=scored)
    yield from scores.items()


# Answers --------------------------------------------------------------------------------------------------------------


def answers_of(model: Nlvr, tokenizer: Tokenizer, examples: Sequence[Example], *, batch: int = 32) -> dict[str, bool]:
    """Whether a model holds each sentence to be true, by the example's id; all processes share the work.

    Nothing is random: images are used unaugmented, in their order. `batch` examples go through the model at
    once. DataError, in every process, for an image that cannot be read or another number of images than the model's.
    """
    count = model.config.images
    if odd := next((e for e in examples if e.count != count), None):
        raise DataError(f"{odd.key} has {odd.count} images, the model was trained on {count}")
    transform = EvalTransform(model.config.vision.image_size)

    def judge(part: Sequence[Example]) -> list[bool]:
        samples = [_sample(example, transform, tokenizer, model.config.text.max_positions) for example in part]
        sentences = sentence_batch(samples, tokenizer).to(next(model.parameters()).device)
        ids = starting_with(sentences.ids, model.config.text.enc_id)
        logits = model.judge(ids, sentences.keep, model.contexts(sentences.image, queries=ids.shape[1])).float()
        return host.read(logits[:, 1] > logits[:, 0])[0].tolist()

    with evaluating(model):
        answers = spread(in_parts(examples, batch), judge, what="examples")
    return {example.id: answer for example, answer in zip(examples, answers, strict=True)}


def _sample(example: Example, transform: EvalTransform, tokenizer: Tokenizer, longest: int) -> Sample:
    try:
        images = read_images(example, DataConfig.max_pixels)
        with own_fault():
            views = torch.stack([transform(image) for image in images])
        sentence = clean_caption(example.sentence, MAX_WORDS)
    except BadSample as error:
        raise DataError(f"{example.key} cannot be evaluated: {error}") from None
    return Sample(views, [tokenizer.pieces(sentence, longest)], example.key, [0])


# Scores ---------------------------------------------------------------------------------------------------------------


def score(
    examples: Sequence[Example],
    answers: Mapping[str, bool],
    *,
    resamples: int = 1000,
    seed: int = 0,
    allow_partial: bool = False,
) -> dict[str, float]:
    """Accuracy, and consistency: the share of sentences answered correctly in all their examples.

    `accuracy_low` and `_high` are the ends of the 95% interval over `resamples` draws of whole sets of examples that
    share images or a sentence; `majority` is the accuracy of always giving the more frequent answer. Answers for
    other examples are left out. DataError if an example has no label or no answer, unless `allow_partial` and only
    some answers are missing.
    """
    unknown = [example.id for example in examples if example.label is None]
    if unknown:
        raise DataError(f"{counted(unknown, 'example')} without a label; the answers can be written, not scored")
    there = [example for example in examples if example.id in answers]
    missing = [example.id for example in examples if example.id not in answers]
    if not there:
        raise DataError(f"none of the {len(examples)} examples has an answer (such as {examples[0].id})")
    if missing and not allow_partial:
        raise DataError(f"no answers for {counted(missing, 'example')} of {len(examples)}; give all, or allow_partial")
    right = np.array([answers[example.id] == example.label for example in there])
    consistent: dict[str, bool] = {}
    for example, fits in zip(there, right.tolist(), strict=True):
        consistent[example.group] = consistent.get(example.group, True) and fits
    true = sum(bool(example.label) for example in there) / len(there)
    scores = {
        "accuracy": float(right.sum()) / len(there),
        "consistency": sum(consistent.values()) / len(consistent),
        "majority": max(true, 1 - true),
    }
    return scores | _interval(there, right, resamples, seed)


def _interval(examples: Sequence[Example], right: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    if not resamples:
        return {}
    folds = {fold: number for number, fold in enumerate(dict.fromkeys(example.fold for example in examples))}
    of = np.array([folds[example.fold] for example in examples])
    hits, sizes = np.bincount(of, right, len(folds)), np.bincount(of, minlength=len(folds))
    draws = np.random.default_rng(seed).integers(len(folds), size=(resamples, len(folds)))
    accuracies = hits[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(accuracies, (0.025, 0.975))
    return {"accuracy_low": float(low), "accuracy_high": float(high)}


# Files ----------------------------------------------------------------------------------------------------------------


def results_csv(examples: Sequence[Example], answers: Mapping[str, bool]) -> str:
    """Format answers for the official scripts: `dev-850-0-0,True` for NLVR2, `dev-1572-0-0.png,true` for NLVR."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for example in examples:
        answer = str(answers[example.id])
        writer.writerow((example.id, answer.lower() if example.boxes > 1 else answer))
    return file.getvalue()


def read_results(path: Path) -> dict[str, bool]:
    """Read answers by id from a file like that of `results_csv`. DataError names the line at fault."""
    answers: dict[str, bool] = {}
    lines: dict[str, int] = {}
    for number, row in csv_records(path):
        if len(row) != 2 or row[1].strip().lower() not in ("true", "false"):
            raise DataError(f"{path}: line {number} is {','.join(row)[:60]!r}; expected ID,True or ID,False")
        name = row[0].strip()
        if name in answers:
            raise DataError(f"{path}: duplicate sentence {name}, in lines {lines[name]} and {number}")
        answers[name], lines[name] = row[1].strip().lower() == "true", number
    if not answers:
        raise DataError(f"{path} is empty; expected lines of ID,True or ID,False")
    return answers
