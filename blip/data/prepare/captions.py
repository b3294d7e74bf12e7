"""Images with captions: one image with one of its captions is a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip.data.draws import Prepare, Sample
from blip.data.formats.sources import Record, Source, open_sources
from blip.data.settings import DataConfig
from blip.data.stream import CaptionShards
from blip.keyed import Purpose, mix
from blip.objectives.batch import Batch
from blip.text import clean_caption, is_sided
from blip.tokenizer import Tokenizer


def open_captions(config: DataConfig) -> list[Source] | list[CaptionShards]:
    """The sources of a run, by number or as shards. Raises DataError."""
    if config.streaming:
        return [CaptionShards(source, config.remote) for source in config.sources]
    return open_sources(config.sources, config.remote)


@dataclass
class PrepareCaptions(Prepare):
    """Choose a caption, decode, augment and tokenize. A sample's text is [CLS], prompt, caption, [SEP].

    ValueError for a prompt that does not fit.
    """

    prompt: int = field(init=False)
    """Word pieces of the prompt."""

    def __post_init__(self) -> None:
        self.prompt = check_prompt(self.tokenizer, self.config)

    def __call__(self, record: Record, key: tuple[int, ...]) -> Sample:
        config = self.config
        chosen = record.captions[mix(Purpose.CAPTION, *key) % len(record.captions)]
        caption = clean_caption(chosen, config.max_words)
        image = self.image(record.image, Purpose.AUGMENTATION, *key, sided=is_sided(caption))
        pieces = self.tokenizer.pieces(f"{config.prompt} {caption}", config.max_tokens)
        return Sample(image, [pieces], record.key, image_id=image_id_of(record))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        ids, keep = self.tokenizer.pad([s.texts[0] for s in samples])
        image = torch.stack([s.images for s in samples])
        image_ids = torch.tensor([s.image_id for s in samples])
        bad = [b for s in samples for b in s.bad]
        return Batch(image, ids, keep, [s.key for s in samples], bad, self.prompt, image_ids)

    def texts(self, record: Record) -> list[str]:
        return [clean_caption(record.captions[0], self.config.max_words)]


def image_id_of(record: Record) -> int:
    """A number of 63 bits for the image of a row: of its file, links followed, or of its encoded bytes.

    Rows of one image have the same, in any format and over all sources. What a source draws is known by its row.
    """
    image = record.image
    name = image if isinstance(image, bytes) else str(image if isinstance(image, Path) else record.key).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def check_prompt(tokenizer: Tokenizer, config: DataConfig) -> int:
    """Number of word pieces of the prompt. ValueError if the tokenizer lacks one or no room is left for a caption."""
    pieces = tokenizer.pieces(config.prompt, len(config.prompt) + 2)[1:-1]
    if tokenizer.unk_id in pieces:
        raise ValueError(f"data.prompt {config.prompt!r} has words that tokenizer {tokenizer.where} does not know")
    if len(pieces) + 3 > config.max_tokens:
        raise ValueError(
            f"data.prompt {config.prompt!r} is {len(pieces)} word pieces long, which with two special tokens leaves no "
            f"room for a caption in data.max_tokens = {config.max_tokens}"
        )
    return len(pieces)
