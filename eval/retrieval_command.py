"""`blip-eval retrieval`: recall of a model's retrieval on a set of pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip import dist
from blip.app.loaded import load
from eval.options import Retrieval
from eval.results_folder import ResultsFolder, listed, settings_of, show
from eval.retrieval import RANKS, Gallery, Ranking, rank


def run(options: Retrieval) -> dict[str, float]:
    """Measure, print and, with `out`, write scores.json and results.json; returns the recalls in percent.

    All processes share the work, and the main one prints and writes.
    """
    dist.start()
    out = ResultsFolder(options.out)
    loaded = load(options.model, options.device, options.precision)
    side = loaded.model.config.vision.image_size
    gallery = Gallery.open(options.source, side, limit=options.limit, batch=options.batch)
    with loaded.computing():
        ranking = rank(loaded.model, loaded.tokenizer, *gallery, k=options.k, max_tokens=options.max_tokens)
    found = ranking.recalls(torch.as_tensor(gallery.image_of_text))
    if not dist.is_main():
        return found
    show(found)
    out.write("results.json", results(gallery.ids, gallery.texts, gallery.image_of_text, ranking))
    counts = {"images": len(gallery.ids), "texts": len(gallery.texts)}
    out.write_scores(found, counts, settings_of(options, "model", "source", "k"))
    return found


def results(
    ids: Sequence[Any],
    texts: Sequence[str],
    owners: Sequence[int],
    ranking: Ranking,
    name: str = "image_id",
    kind: str = "images",
) -> str:
    """What was found, as JSON: for each image its best texts, for each text its best images, up to 10 of each.

    `ids` are those of the images, `owners` says which each text belongs to; `name` and `kind` are what to call them.
    """
    never = float("-inf")
    of_image = ranking.scores.masked_fill(~ranking.of_image, never)
    of_text = ranking.scores.masked_fill(~ranking.of_text, never).T
    there = [{name: id, **_best(row, "texts", range(len(texts)))} for id, row in zip(ids, of_image, strict=True)]
    back = [
        {"text": text, name: ids[owner], **_best(row, kind, ids)}
        for text, owner, row in zip(texts, owners, of_text, strict=True)
    ]
    return f'{{"texts_of_{kind[:-1]}": {listed(there).strip()},\n "{kind}_of_text": {listed(back).strip()}}}\n'


def _best(scores: Tensor, kind: str, names: Sequence[Any]) -> dict[str, Any]:
    best = scores.topk(min(max(RANKS), len(scores)))
    kept = [(names[i], round(value, 4)) for i, value in zip(*map(Tensor.tolist, best[::-1]), strict=True)]
    kept = [(name, value) for name, value in kept if value != float("-inf")]
    return {kind: [name for name, _ in kept], "scores": [value for _, value in kept]}
