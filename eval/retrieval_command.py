"""`python -m eval retrieval`: recall of a model's retrieval on a set of pictures and captions."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from blip import atomic
from blip.commands.loading import load
from eval.options import Retrieval
from eval.retrieval import Gallery, retrieval


def run(options: Retrieval) -> dict[str, float]:
    """Measure, print and, with `out`, write scores.json; returns the recalls in percent."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("retrieval is measured by one process: start it without torchrun")
    loaded = load(options.model, options.device, options.precision)
    side = loaded.model.config.vision.image_size
    gallery = Gallery.open(options.source, side, limit=options.limit, batch=options.batch)
    with loaded.computing():
        found = retrieval(
            loaded.model, loaded.tokenizer, *gallery, k=options.k, max_tokens=options.max_tokens, progress=True
        )
    for name, value in found.items():
        print(f"{name:<16}{value:7.2f}")
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        counts = {"images": len(gallery.images.dataset), "texts": len(gallery.texts)}
        record = found | counts | {"model": options.model, "source": dataclasses.asdict(options.source), "k": options.k}
        atomic.replace_file(out / "scores.json", (json.dumps(record, indent=1) + "\n").encode())
    return found
