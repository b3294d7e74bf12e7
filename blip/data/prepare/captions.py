"""Sources mixed by weight in a keyed order: draw (epoch, index) -> one image with one of its captions.

A sample is a function of (seed, epoch, index) alone, so any worker, process or resumed run makes the same one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip.data.formats.sources import Record, Source, digest
from blip.data.images import model_input
from blip.data.settings import DataConfig
from blip.errors import BadSample, DataError
from blip.keyed import mix, permutation
from blip.objectives.batch import Bad, Batch
from blip.text import clean_caption, is_sided
from blip.tokenizer import Tokenizer

ATTEMPTS = 16
"""Samples tried in place of an unreadable one before the run stops."""
LEFT_OUT = "left out: decoding it took too long before"
_PROBES = 200
"""Captions that are tried on the tokenizer at the start."""
_ORDER, _SHUFFLE, _CAPTION, _REPLACE, _AUGMENT = range(5)
"""What a key is for: two uses of one (seed, epoch, index) must not draw the same bits."""


@dataclass
class Sample:
    """One pair, ready to be put in a batch."""

    image: Tensor
    """(3, S, S) float32."""
    pieces: list[int]
    """[CLS], the prompt's and the caption's word pieces, [SEP]."""
    key: str
    bad: list[Bad] = field(default_factory=list)
    """Samples that were tried before this one."""
    image_id: int = 0
    """The same for all rows of one picture: see `picture_id`."""


def make_sample(
    record: Record, transform: Callable, tokenizer: Tokenizer, config: DataConfig, key: tuple[int, ...]
) -> Sample:
    """Choose a caption, decode, augment and tokenize, all keyed. Raises BadSample."""
    raw = record.captions[mix(_CAPTION, *key) % len(record.captions)]
    caption = clean_caption(raw, config.max_words)
    sided = is_sided(caption)
    pixels = model_input(
        record.image, config.max_pixels, lambda image: transform(image, _AUGMENT, *key, sided=sided), transform.at_least
    )
    pieces = tokenizer.pieces(f"{config.prompt} {caption}", config.max_tokens)
    return Sample(pixels, pieces, record.key, image_id=picture_id(record))


def make_batch(samples: Sequence[Sample], tokenizer: Tokenizer, prompt: int = 0) -> Batch:
    """B samples whose texts begin with `prompt` given word pieces -> one Batch, texts padded to the longest."""
    ids, keep = tokenizer.pad([s.pieces for s in samples])
    image = torch.stack([s.image for s in samples])
    image_ids = torch.tensor([s.image_id for s in samples])
    return Batch(image, ids, keep, [s.key for s in samples], [b for s in samples for b in s.bad], prompt, image_ids)


def picture_id(record: Record) -> int:
    """A number of 63 bits for the picture of a row: of its file, links followed, or of its encoded bytes.

    Rows of one picture have the same, in any format and over all sources. What a source draws is known by its row.
    """
    image = record.image
    name = image if isinstance(image, bytes) else str(image if isinstance(image, Path) else record.key).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


class Pairs(Dataset):
    """Image-text pairs by draw, with unreadable ones replaced by others of the same source."""

    def __init__(
        self, sources: Sequence[Source], transform: Callable, tokenizer: Tokenizer, config: DataConfig, seed: int
    ):
        """Raises DataError when there is nothing to draw from, or when the tokenizer does not know the captions.

        ValueError for a prompt that does not fit.
        """
        if not sources or not all(len(s) for s in sources):
            raise DataError("no data: every source must have at least one row")
        self.sources, self.transform, self.tokenizer = list(sources), transform, tokenizer
        self.config, self.seed = config, seed
        self.left_out: frozenset[str] = frozenset()
        """Keys of samples that are replaced unread."""
        self._starts = np.cumsum([0, *(len(s) for s in sources)])
        self._shown = [max(1, round(s.weight * len(s))) for s in sources]
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        self.prompt = check_prompt(tokenizer, config)
        check_captions(tokenizer, self.probe(), config.max_unknown)

    @property
    def rows(self) -> int:
        """Rows of all sources together."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return sum(self._shown)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_order": None}  # workers are told what to draw

    def order(self, epoch: int) -> np.ndarray:
        """The draws of an epoch, (len(self),) int64: row numbers over all sources, in a keyed order.

        A source of weight 0.5 shows one half in one epoch and the other in the next. Where a source shows a row a
        second time, `rows` is added, so that the second showing is augmented in another way.
        """
        return self._order(epoch)

    def _make_order(self, epoch: int) -> np.ndarray:
        draws = np.concatenate([self._drawn(s, epoch) for s in range(len(self.sources))])
        return draws[permutation(len(draws), self.seed, _SHUFFLE, epoch)]

    def _drawn(self, s: int, epoch: int) -> np.ndarray:
        """Which rows of source s an epoch shows: a window of an endless run of permutations."""
        n, shown = len(self.sources[s]), self._shown[s]
        first, parts = epoch * shown, []
        for number in range(first // n, (first + shown - 1) // n + 1):
            low, high = max(first, number * n) - number * n, min(first + shown, (number + 1) * n) - number * n
            rows = permutation(n, self.seed, _ORDER, s, number)[low:high] if high - low < n else np.arange(n)
            parts.append(rows + (number - first // n) * self.rows)
        return np.concatenate(parts) + self._starts[s]

    def _locate(self, index: int) -> tuple[int, int]:
        row = index % self.rows
        s = int(np.searchsorted(self._starts, row, side="right")) - 1
        return s, row - int(self._starts[s])

    def key(self, index: int) -> str:
        """Where a draw comes from, without reading it."""
        s, row = self._locate(index)
        return self.sources[s].key(row)

    def __getitem__(self, draw: tuple[int, int]) -> Sample:
        """Read the draw (epoch, index), or what replaces it; a replacement is as fixed by the key as the sample.

        Raises DataError when `ATTEMPTS` samples in a row are unreadable.
        """
        return self.read(draw, lambda key: None)

    def read(self, draw: tuple[int, int], note: Callable[[str], None]) -> Sample:
        """As `self[draw]`; `note` is told the key of each sample before it is read."""
        epoch, index = (int(v) for v in draw)
        s, row = self._locate(index)
        source, bad = self.sources[s], []
        for attempt in range(ATTEMPTS):
            key, name = (self.seed, epoch, index, attempt), source.key(row)
            try:
                if name in self.left_out:
                    raise BadSample(LEFT_OUT)
                note(name)
                sample = self.make(source[row], key)
                sample.bad = bad
                return sample
            except BadSample as error:
                bad.append(Bad(name, error.reason))
            row = mix(_REPLACE, *key) % len(source)
        listed = "; ".join(f"{b.key}: {b.reason}" for b in bad[:3])
        raise DataError(f"{ATTEMPTS} samples in a row are unreadable, the first: {listed}")

    def make(self, record: Record, key: tuple[int, ...]) -> Sample:
        """A row as the model is shown it; data of other kinds have their own. Raises BadSample."""
        return make_sample(record, self.transform, self.tokenizer, self.config, key)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """What a training step is given of some samples."""
        return make_batch(samples, self.tokenizer, self.prompt)

    def probe(self) -> list[str]:
        """Some captions, evenly spread; unreadable rows are left for the ledger."""
        captions = []
        for source in self.sources:
            for row in np.linspace(0, len(source) - 1, min(len(source), max(1, _PROBES // len(self.sources)))):
                try:
                    captions.append(clean_caption(source[int(row)].captions[0], self.config.max_words))
                except BadSample:
                    continue
        return captions

    def fingerprint(self) -> str:
        """A hash of what the data is: file names, sizes, row counts, and every setting that changes samples."""
        c = self.config
        settings = (c.prompt, c.max_words, c.max_tokens, c.max_pixels, self.transform.describe(), self.seed)
        return digest(self.sources, *settings, self.tokenizer.digest())


def check_captions(tokenizer: Tokenizer, captions: Sequence[str], limit: float) -> None:
    """Raise DataError when more than a share `limit` of the word pieces of some captions is unknown."""
    rate = tokenizer.unknown_rate(captions)
    if rate > limit:
        raise DataError(
            f"{rate:.1%} of the word pieces of {len(captions)} captions are unknown to tokenizer {tokenizer.where} "
            f"(e.g. {captions[0][:60]!r}); the limit is data.max_unknown = {limit:.1%}. Is it the right vocabulary?"
        )


def check_prompt(tokenizer: Tokenizer, config: DataConfig) -> int:
    """How many word pieces the prompt is. ValueError if the tokenizer lacks one or no room is left for a caption."""
    pieces = tokenizer.pieces(config.prompt, len(config.prompt) + 2)[1:-1]
    if tokenizer.unk_id in pieces:
        raise ValueError(f"data.prompt {config.prompt!r} has words that tokenizer {tokenizer.where} does not know")
    if len(pieces) + 3 > config.max_tokens:
        raise ValueError(
            f"data.prompt {config.prompt!r} is {len(pieces)} word pieces long, which with two special tokens leaves no "
            f"room for a caption in data.max_tokens = {config.max_tokens}"
        )
    return len(pieces)
