"""`blip-eval classification`: how often a model names the class of a picture, without having been taught."""

from __future__ import annotations

import sys
from pathlib import Path

from blip import dist
from blip.app.loaded import load
from blip.data.image_files import not_pictures
from blip.inference.features import Features
from blip.inference.zero_shot import TEMPLATES
from eval.classification import ClassFolder, accuracy, classify, read_names, read_templates
from eval.options import Classification
from eval.results_folder import ResultsFolder, listed, settings_of, show


def run(options: Classification) -> dict[str, float]:
    """Measure, print and, with `out`, write scores.json and results.json; returns the scores in percent.

    All processes share the work, and the main one prints and writes.
    """
    dist.start()
    out = ResultsFolder(options.out)
    data = ClassFolder.open(options.source, read_names(Path(options.names)) if options.names else None)
    templates = read_templates(Path(options.templates)) if options.templates else list(TEMPLATES)
    loaded = load(options.model, options.device, options.precision)
    features = Features(loaded.model, loaded.tokenizer, batch=options.batch)
    with loaded.computing():
        chances = classify(features, data, templates)
    found = accuracy(chances, data.labels)
    if not dist.is_main():
        return found
    if said := not_pictures(data.left_out):
        print(said, file=sys.stderr)
    show(found)
    best = chances.topk(min(5, len(data.names)), dim=1)
    rows = [
        {
            "picture": Path(path).relative_to(data.where).as_posix(),
            "class": data.names[label],
            "found": [data.names[i] for i in numbers],
            "probability": [round(value, 5) for value in values],
        }
        for path, label, numbers, values in zip(
            data.paths, data.labels, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
    out.write("results.json", listed(rows))
    counts = {"pictures": len(data.paths), "classes": len(data.names)}
    out.write_scores(found, counts, settings_of(options, "model", "source"), {"templates": templates})
    return found
