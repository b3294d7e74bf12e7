"""Text-video retrieval with a model of images, without training on videos (paper, section 5.6). N clips, M texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from blip.errors import BadSample, DataError
from blip.models.blip import Blip
from blip.models.video import FRAMES, clip_tokens, embed_clip
from blip.text import clean_caption
from blip.tokenizer import Tokenizer
from eval.clips import Clip, batches
from eval.retrieval import Ranking, Views, compare

MAX_WORDS = 40
"""Words kept of a text."""


class ClipViews(Views):
    """Clips as a model sees them, in batches of frames (B, F, 3, S, S); nothing is left out silently."""

    def __init__(
        self, clips: Sequence[Clip], image_size: int, frames: int = FRAMES, batch: int = 4, threads: int = 2
    ) -> None:
        self.clips, self.frames = list(clips), frames
        self.image_size, self.batch, self.threads = image_size, batch, threads

    def share(self, first: int, step: int) -> Iterator[Tensor]:
        size, rows = self.batch, range(len(self.clips))
        mine = [row for start in range(first * size, len(rows), step * size) for row in rows[start : start + size]]
        return batches(self.clips, mine, size, self.frames, self.image_size, self.threads)


class ClipGallery(NamedTuple):
    """Held-out clips and texts, as `rank_clips` takes them."""

    clips: ClipViews
    texts: list[str]
    """Cleaned captions."""
    clip_of_text: list[int]
    """Which clip each caption belongs to."""

    @classmethod
    def of(
        cls, clips: Sequence[Clip], image_size: int, *, frames: int = FRAMES, batch: int = 4, threads: int = 2
    ) -> ClipGallery:
        """All captions of some clips. DataError for one without words, or if there is none."""
        texts, owner = [], []
        for number, clip in enumerate(clips):
            for caption in clip.captions:
                try:
                    texts.append(clean_caption(caption, MAX_WORDS))
                except BadSample as error:
                    raise DataError(f"video {clip.id} cannot be evaluated: {error}") from None
                owner.append(number)
        if not texts:
            raise DataError("the clips have no captions")
        return cls(ClipViews(clips, image_size, frames, batch, threads), texts, owner)

    @property
    def ids(self) -> list[str | int]:
        """What the list calls each clip."""
        return [clip.id for clip in self.clips.clips]


def rank_clips(
    model: Blip,
    tokenizer: Tokenizer,
    gallery: ClipGallery,
    *,
    k: int = 128,
    max_tokens: int = 35,
    batch: int = 256,
) -> Ranking:
    """Compare all clips with all texts by ITC, and the best `k` of each by ITM too, over the tokens of all frames.

    Like `eval.retrieval.rank`, processes included.
    """
    return compare(
        model,
        tokenizer,
        *gallery,
        see=lambda frames: clip_tokens(model.vision, frames),
        embed=lambda tokens: embed_clip(model, tokens, gallery.clips.frames),
        k=k,
        max_tokens=max_tokens,
        batch=batch,
    )
