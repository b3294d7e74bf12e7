"""Text-video retrieval with an image model, without training on videos (paper, section 5.6). N clips, M texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from blip.errors import DataError
from blip.models.blip import Blip
from blip.models.video import FRAMES, clip_tokens, embed_clip
from blip.tokenizer import Tokenizer
from eval.clips import VideoClip, batches, read_clips
from eval.options import VideoRetrievalOptions
from eval.retrieval import Gallery, Ranking, Views, cleaned, compare, measured
from eval.runner import Runner

MAX_WORDS = 40
"""Most words of a text."""


def evaluate(options: VideoRetrievalOptions, runner: Runner) -> Iterator[tuple[str, float]]:
    """Evaluate a model; writes results.json, the best texts of each clip and the best clips of each text.

    `tr@` is from clip to text, `ir@` from text to clip, the paper's direction.
    """
    file = Path(options.clips).expanduser()
    root = Path(options.video_root).expanduser() if options.video_root else file.parent
    clips = read_clips(file, root.absolute(), options.split)[: options.limit]
    with runner.model() as loaded:
        side, frames = loaded.model.config.vision.image_size, options.frames
        gallery = gallery_of(clips, side, frames=frames, batch=options.batch)
        ways = {"frames": frames, "k": options.k, "max_tokens": options.max_tokens}
        ranking = rank_clips(loaded.model, loaded.tokenizer, gallery, **ways)
    settings = ("model", "clips", "split", "frames", "k")
    yield from measured(gallery, ranking, runner, *settings, name="video_id", kind="videos")


def gallery_of(
    clips: Sequence[VideoClip], image_size: int, *, frames: int = FRAMES, batch: int = 4, threads: int = 2
) -> Gallery:
    """Clips in batches of frames (B, F, 3, S, S) with all their captions.

    DataError for a caption without words, or if there are no captions.
    """
    texts, owner = cleaned([(f"video {clip.id}", clip.captions) for clip in clips], MAX_WORDS)
    if not texts:
        raise DataError("the clips have no captions")
    ids = [clip.id for clip in clips]
    return Gallery(
        Views(ids, lambda rows: batches(clips, rows, batch, frames, image_size, threads), batch), texts, owner
    )


def rank_clips(
    model: Blip,
    tokenizer: Tokenizer,
    gallery: Gallery,
    *,
    frames: int = FRAMES,
    k: int = 128,
    max_tokens: int = 35,
    batch: int = 256,
) -> Ranking:
    """Compare all clips with all texts by ITC, and the best `k` of each by ITM too, over the tokens of all `frames`.

    Like `eval.retrieval.rank`, processes included.
    """
    return compare(
        model,
        tokenizer,
        *gallery,
        see=lambda views: clip_tokens(model.vision, views),
        embed=lambda tokens: embed_clip(model, tokens, frames),
        k=k,
        max_tokens=max_tokens,
        batch=batch,
    )
