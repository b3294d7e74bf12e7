"""`blip-eval video_retrieval`: recall of a model's retrieval on clips and captions, without training on them."""

from __future__ import annotations

from pathlib import Path

import torch

from blip import dist
from blip.app.loaded import load
from eval.clips import read_clips
from eval.options import VideoRetrieval
from eval.results_folder import ResultsFolder, settings_of, show
from eval.retrieval_command import results
from eval.video_retrieval import ClipGallery, rank_clips


def run(options: VideoRetrieval) -> dict[str, float]:
    """Measure, print and, with `out`, write scores.json and results.json; returns the recalls in percent.

    `tr@` is from clip to text, `ir@` from text to clip, the paper's direction. All processes share the work, and the
    main one prints and writes.
    """
    dist.start()
    out = ResultsFolder(options.out)
    file = Path(options.clips).expanduser()
    root = Path(options.video_root).expanduser() if options.video_root else file.parent
    clips = read_clips(file, root.absolute(), options.split)[: options.limit]
    loaded = load(options.model, options.device, options.precision)
    side = loaded.model.config.vision.image_size
    gallery = ClipGallery.of(clips, side, frames=options.frames, batch=options.batch)
    with loaded.computing():
        ways = {"k": options.k, "max_tokens": options.max_tokens}
        ranking = rank_clips(loaded.model, loaded.tokenizer, gallery, **ways)
    found = ranking.recalls(torch.as_tensor(gallery.clip_of_text))
    if not dist.is_main():
        return found
    show(found)
    out.write("results.json", results(gallery.ids, gallery.texts, gallery.clip_of_text, ranking, "video_id", "videos"))
    counts = {"videos": len(clips), "texts": len(gallery.texts)}
    out.write_scores(found, counts, settings_of(options, "model", "clips", "split", "frames", "k"))
    return found
