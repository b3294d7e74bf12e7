"""Captioning: captions that a model generates, scored against human captions (paper, section 5.2).

`captions_of(model, tokenizer, Images.open(source), config, prompt="a picture of ")` generates a caption of each image,
`score(images.references, captions).values["cider"]` scores them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blip import dist
from blip.inference.generate import generate_texts
from blip.inference.settings import DecodeConfig
from blip.models.blip import Blip
from blip.progress import bar
from blip.tokenizer import Tokenizer
from eval.caption_page import report
from eval.images import Images
from eval.metrics.captions import Metric, bleu, cider, mean, rouge_l, summary
from eval.metrics.java import NoJava, meteor_of, meteor_statistics, meteor_summable, spice_scores
from eval.metrics.ptb import Choice, tokenize
from eval.options import CaptioningOptions
from eval.references import ImageId, matching, read_references, read_results
from eval.runner import Runner, evaluating, listed, together


def evaluate(options: CaptioningOptions, runner: Runner) -> Iterator[tuple[str, float]]:
    """Evaluate captions of a model or a file; writes results.json, the captions, and captions.html."""
    images = Images.open(options.source, options.limit, options.remote) if options.source else None
    entries = read_references(Path(options.references)) if options.references else images.entries
    trained_on: tuple[str, ...] = ()
    if options.model:
        with runner.model() as loaded:
            trained_on = loaded.trained_on
            ways = {"prompt": options.prompt, "batch": options.batch, "threads": options.threads}
            results = captions_of(loaded.model, loaded.tokenizer, images, options.decode, **ways)
    else:
        results = read_results(Path(options.results))
    if not dist.is_main():
        return
    runner.out.write("results.json", coco_results(results))
    references = {entry.id: entry.captions for entry in entries}
    if options.model and not any(references.values()):
        return runner.unscored("results.json", "references")
    scores = score(
        references,
        results,
        tokenizer=options.tokenizer,
        meteor=options.meteor,
        spice=options.spice,
        groups={entry.id: entry.domain.removesuffix("-domain") for entry in entries if entry.domain},
        resamples=options.resamples,
        seed=options.seed,
        allow_partial=options.allow_partial,
        seconds=options.java_timeout,
        spice_folder=options.spice_folder,
    )
    print(f"{scores.images} images, {scores.references} reference captions; words by {scores.tokenizer}")
    if scores.missing:
        print(f"left out for want of a result: {scores.missing} images")
    for name, reason in scores.not_computed.items():
        print(f"{name} not computed: {reason}")
    runner.record(*(("model", "prompt", "decode", "limit") if options.model else ()), "source", **scores.facts())
    files = {"results_file": options.results, "references_file": options.references}
    runner.record(**{name: path for name, path in files.items() if path is not None})
    if options.out:
        values = scores.values | runner.facts
        html = report(values, scores.cider, references, results, images, options.shown, trained_on)
        runner.out.write("captions.html", html)
    yield from scores.values.items()


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions (papers print 100 times as much), and their provenance."""

    values: dict[str, float]
    """bleu_1 to bleu_4, cider, rouge_l, and meteor and spice if computed; each with `_low` and `_high`, the ends of its
    95% interval, and those of a group of images as `group_name`."""
    cider: dict[Any, float]
    """CIDEr of each image's caption."""
    tokenizer: str
    """Tokenizer that split the captions into words."""
    images: int
    """Images that were scored."""
    references: int
    """Reference captions of those images."""
    missing: int
    """Images with references that had no result and were left out."""
    resamples: int
    """Bootstrap draws of the intervals."""
    seed: int
    """Random seed of the draws."""
    groups: dict[str, int] = field(default_factory=dict)
    """Images in each group."""
    not_computed: dict[str, str] = field(default_factory=dict)
    """Metrics that were requested but not computed, and why; `java_tokenizer` where Python's replaced it."""

    def facts(self) -> dict[str, Any]:
        """Provenance of the scores, as JSON can hold it."""
        rest = dataclasses.asdict(self)
        del rest["values"], rest["cider"]
        return rest


def score(
    references: Mapping[Any, Sequence[str]],
    results: Mapping[Any, str],
    *,
    tokenizer: Choice = "auto",
    meteor: bool = False,
    spice: bool = False,
    groups: Mapping[Any, str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    allow_partial: bool = False,
    seconds: float = 300.0,
    spice_folder: str | None = None,
) -> CaptionScores:
    """Score one caption an image against the image's reference captions, ids being whatever the two mappings share.

    `groups` names a group of some images; each group is scored as a set of its own, too (NoCaps). `resamples` 0 leaves
    the intervals out. Each Java program gets `seconds`. DataError if the ids do not match, unless `allow_partial` and
    only results are missing; NoJava if `tokenizer` is "java" and that does not answer.
    """
    ids = matching(references, results, allow_partial=allow_partial)
    texts = [results[name] for name in ids] + [text for name in ids for text in references[name]]
    tokens = tokenize(texts, tokenizer, seconds)
    captions, rest = tokens.texts[: len(ids)], iter(tokens.texts[len(ids) :])
    compared = [[next(rest) for _ in references[name]] for name in ids]
    not_computed = {"java_tokenizer": tokens.fallback} if tokens.fallback else {}
    extra = []
    for name, wanted in (("meteor", meteor), ("spice", spice)):
        try:
            if wanted:
                extra.append(_by_java(name, compared, captions, seconds, spice_folder))
        except NoJava as error:
            not_computed[name] = str(error)

    def of(rows: Sequence[int], prefix: str = "") -> tuple[dict[str, float], np.ndarray]:
        some, theirs = [captions[i] for i in rows], [compared[i] for i in rows]
        ciders = cider(theirs, some)
        own = [bleu(theirs, some), mean("cider", ciders), mean("rouge_l", rouge_l(theirs, some))]
        own += [metric._replace(rows=metric.rows[rows]) for metric in extra]
        scores = summary(own, resamples, seed)
        return {prefix + name: value for name, value in scores.items()}, ciders

    values, ciders = of(range(len(ids)))
    members: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        if groups and name in groups:
            members.setdefault(groups[name], []).append(row)
    for group, rows in members.items():
        values |= of(rows, f"{group}_")[0]
    return CaptionScores(
        values,
        cider=dict(zip(ids, ciders.tolist(), strict=True)),
        tokenizer=tokens.tokenizer,
        images=len(ids),
        references=len(texts) - len(ids),
        missing=len(references) - len(ids),
        resamples=resamples,
        seed=seed,
        groups={group: len(rows) for group, rows in members.items()},
        not_computed=not_computed,
    )


def _by_java(
    name: str, references: Sequence[Sequence[str]], captions: Sequence[str], seconds: float, folder: str | None
) -> Metric:
    if name == "spice":
        return mean("spice", spice_scores(references, captions, seconds, folder))
    statistics = meteor_summable(meteor_statistics(references, captions, seconds))
    return Metric(("meteor",), statistics, lambda sums, _: meteor_of(sums)[..., None])


# Captions -------------------------------------------------------------------------------------------------------------


def captions_of(
    model: Blip,
    tokenizer: Tokenizer,
    images: Images,
    config: DecodeConfig,
    *,
    prompt: str = "",
    batch: int = 32,
    threads: int = 2,
) -> dict[ImageId, str]:
    """Caption each image; all processes share the work, and each returns all captions by image.

    All processes have to call it. `batch` images go through the model at once; `prompt` is not part of the captions.
    DataError, in every process, if an image cannot be read.
    """
    config = dataclasses.replace(config, num=1)
    mine = range(dist.rank(), len(images), dist.world())
    device, side = next(model.parameters()).device, model.config.vision.image_size

    def work() -> list[tuple[ImageId, str]]:
        captions = []
        with bar(len(mine), "caption", "images", show=dist.is_main()) as progress:
            for ids, views in images.batches(mine, batch, side, threads):
                views, keys = views.to(device, non_blocking=True), [str(i) for i in ids]
                texts = generate_texts(model, tokenizer, views, config, prompt=prompt, keys=keys)
                captions += [(name, best.text) for name, (best,) in zip(ids, texts, strict=True)]
                progress.update(len(ids))
        return captions

    with evaluating(model):
        captions = [caption for share in together(work) for caption in share]
    wanted = [entry.id for entry in images.entries]
    assert Counter(name for name, _ in captions) == Counter(wanted), "an image was captioned twice or not at all"
    by_id = dict(captions)
    return {name: by_id[name] for name in wanted}


def coco_results(captions: Mapping[ImageId, str]) -> str:
    """Format captions as COCO's and NoCaps's servers expect them."""
    return listed([{"image_id": name, "caption": caption} for name, caption in captions.items()])
