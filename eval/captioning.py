"""Captioning: what a model writes about pictures, scored against what people wrote (paper, section 5.2).

`captions_of(model, tokenizer, Pictures.open(source), config, prompt="a picture of ")` writes a caption of each picture,
`score(pictures.references, captions).values["cider"]` says how good they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from blip import dist
from blip.errors import DataError
from blip.inference.generate import write
from blip.inference.settings import DecodeConfig
from blip.models.blip import Blip
from blip.tokenizer import Tokenizer
from blip.train.log import bar
from eval.metrics.captions import Metric, bleu, cider, mean, rouge_l, summary
from eval.metrics.java import NoJava, meteor_of, meteor_statistics, meteor_summable, spice_scores
from eval.metrics.ptb import Choice, tokenize
from eval.pictures import Pictures
from eval.references import Id, matching


@dataclass(frozen=True)
class Scores:
    """Scores as fractions (papers print 100 times as much), and how they came about."""

    values: dict[str, float]
    """bleu_1 to bleu_4, cider, rouge_l, and meteor and spice if computed; each with `_low` and `_high`, the ends of its
    95% interval, and those of a group of images as `group_name`."""
    cider: dict[Any, float]
    """CIDEr of each image's caption."""
    tokenizer: str
    """Who split the captions into words."""
    images: int
    """Images that were scored."""
    references: int
    """Their reference captions."""
    missing: int
    """Images with references that had no result and were left out."""
    resamples: int
    """Draws that the intervals are of."""
    seed: int
    """Of the draws."""
    groups: dict[str, int] = field(default_factory=dict)
    """Images in each group."""
    not_computed: dict[str, str] = field(default_factory=dict)
    """What was asked for and is not there, and why; `java_tokenizer` where the Java-free one stood in."""

    def record(self) -> dict[str, Any]:
        """All but the images' own scores, as JSON can hold it; scores first, by their names."""
        rest = dataclasses.asdict(self)
        del rest["values"], rest["cider"]
        return {**self.values, **rest}


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
) -> Scores:
    """Score one caption an image against the image's reference captions, ids being whatever the two mappings share.

    `groups` names a group of some images; each group is scored as a set of its own, too (NoCaps). `resamples` 0 leaves
    the intervals out. Each Java program gets `seconds`. DataError if the ids do not match, unless `allow_partial` and
    only results are missing; NoJava if `tokenizer` is "java" and that does not answer.
    """
    ids = matching(references, results, allow_partial=allow_partial)
    texts = [results[name] for name in ids] + [text for name in ids for text in references[name]]
    tokens = tokenize(texts, tokenizer, seconds)
    captions, rest = tokens.texts[: len(ids)], iter(tokens.texts[len(ids) :])
    written = [[next(rest) for _ in references[name]] for name in ids]
    not_computed = {"java_tokenizer": tokens.fallback} if tokens.fallback else {}
    extra = []
    for name, wanted in (("meteor", meteor), ("spice", spice)):
        try:
            if wanted:
                extra.append(_by_java(name, written, captions, seconds, spice_folder))
        except NoJava as error:
            not_computed[name] = str(error)

    def of(rows: Sequence[int], prefix: str = "") -> tuple[dict[str, float], np.ndarray]:
        some, said = [written[i] for i in rows], [captions[i] for i in rows]
        ciders = cider(some, said)
        own = [bleu(some, said), mean("cider", ciders), mean("rouge_l", rouge_l(some, said))]
        own += [metric._replace(rows=metric.rows[rows]) for metric in extra]
        found = summary(own, resamples, seed)
        return {prefix + name: value for name, value in found.items()}, ciders

    values, ciders = of(range(len(ids)))
    members: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        if groups and name in groups:
            members.setdefault(groups[name], []).append(row)
    for group, rows in members.items():
        values |= of(rows, f"{group}_")[0]
    return Scores(
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


def captions_of(
    model: Blip,
    tokenizer: Tokenizer,
    pictures: Pictures,
    config: DecodeConfig,
    *,
    prompt: str = "",
    batch: int = 32,
    threads: int = 2,
) -> dict[Id, str]:
    """Write a caption of each picture; all processes share the work, and each returns all captions by image.

    All processes have to call it. `batch` pictures go through the model at once; `prompt` is not part of the captions.
    DataError, in every process, if a picture cannot be read.
    """
    config = dataclasses.replace(config, num=1)
    mine = range(dist.rank(), len(pictures), dist.world())
    device, training = next(model.parameters()).device, model.training
    said: dict[Id, str] = {}
    failure = None
    model.eval()
    told = bar(len(mine), "caption", "pictures", show=dist.is_main())
    try:
        for ids, images in pictures.batches(mine, batch, model.config.vision.image_size, threads):
            with torch.no_grad():
                texts = write(model, tokenizer, images.to(device), config, prompt=prompt, keys=[str(i) for i in ids])
            said |= {name: found[0].words for name, found in zip(ids, texts, strict=True)}
            told.update(len(ids))
    except (DataError, ValueError) as error:  # the others wait in `gather_objects`, so they have to be told
        failure = error
    finally:
        told.close()
        model.train(training)
    parts = dist.gather_objects((list(said.items()), failure))
    for _, failure in parts:
        if failure:
            raise failure
    wanted = [entry.id for entry in pictures.entries]
    found = [item for items, _ in parts for item in items]
    assert Counter(name for name, _ in found) == Counter(wanted), "a picture was captioned twice or not at all"
    by_id = dict(found)
    return {name: by_id[name] for name in wanted}


def coco_results(captions: Mapping[Id, str]) -> str:
    """Captions as COCO's and NoCaps's servers take them."""
    rows = [json.dumps({"image_id": name, "caption": caption}) for name, caption in captions.items()]
    return "[\n" + ",\n".join(rows) + "\n]\n"
