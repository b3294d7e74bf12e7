"""The interface of scorers, and a fake one that derives scores from hashes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass
class Item:
    """An image with its web texts, as the models' input."""

    sample_id: str
    pixels: list[np.ndarray]
    """Resized images, (S, S, 3) uint8, one for each of `Scorer.sides`."""
    texts: list[str]


@dataclass
class Matched:
    """The filter's scores of one text."""

    margin: float
    """Match margin: logit of match minus logit of no match."""
    itc: float
    tokens: int
    truncated: bool = False

    @property
    def probability(self) -> float:
        """Return the softmax P(match)."""
        if not math.isfinite(self.margin):
            return math.nan
        return 1 / (1 + math.exp(-self.margin)) if self.margin > -700 else 0.0


@dataclass
class SyntheticText:
    """A synthetic text with the filter's scores of it."""

    text: str
    logprob: float
    finished: bool
    match: Matched


@dataclass
class Scores:
    """Web and synthetic texts of an item with their scores; `web` is parallel to its texts."""

    web: list[Matched] = field(default_factory=list)
    syn: list[SyntheticText] = field(default_factory=list)
    embedding: np.ndarray | None = None
    """The filter's embedding of the image, (E,) of length 1; None unless `Scorer.keeps_embeddings`."""


class BatchTooLarge(Exception):
    """A batch did not fit into the device's memory."""


class Scorer(Protocol):
    """Captioner and filter. The scores of an item must not depend on the rest of the batch."""

    sides: tuple[int, ...]
    """Input sizes of the models, pixels."""
    device: str
    facts: dict[str, str]
    """Facts recorded in every part file."""
    batch_size: int
    """Default number of items per batch."""
    keeps_embeddings: bool
    """Whether scores have the embeddings of the images; false at first."""
    embedding_size: int

    def score(self, items: Sequence[Item]) -> list[Scores]:
        """Score items. Raises BatchTooLarge."""

    def ahead(self, items: Sequence[Item]) -> None:
        """Begin with a batch that comes after the next one to be scored, if that is of use; returns at once."""

    def embed(self, items: Sequence[Item]) -> np.ndarray:
        """Return the filter's embeddings of the images alone, (B, E). Raises BatchTooLarge."""


class FakeScorer:
    """Scores that are a function of the sample, the pixels and the text: for tests, rehearsals and measurements."""

    sides = (16,)
    device = "none"
    batch_size = 64
    keeps_embeddings = False
    embedding_size = 48

    def __init__(self, seed: int, captions: int, itm_token: str, seconds: float = 0.0) -> None:
        """Make a scorer that sleeps `seconds` per item."""
        self.seed, self.captions, self.token, self.seconds = seed, captions, itm_token, seconds
        self.facts = {"scorer": "fake"}

    def score(self, items: Sequence[Item]) -> list[Scores]:
        if self.seconds:
            time.sleep(self.seconds * len(items))
        scores = [self._score(item) for item in items]
        if self.keeps_embeddings:
            for one, embedding in zip(scores, self.embed(items), strict=True):
                one.embedding = embedding
        return scores

    def ahead(self, items: Sequence[Item]) -> None:
        pass

    def embed(self, items: Sequence[Item]) -> np.ndarray:
        """Return colours of 4 x 4 fields: equal images are equal, and images that look the same are near."""
        pixels = np.stack([item.pixels[0] for item in items]).astype(np.float32) + 1
        fields = pixels.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4)).reshape(-1, self.embedding_size)
        return fields / np.linalg.norm(fields, axis=1, keepdims=True)

    def _score(self, item: Item) -> Scores:
        seen = hashlib.sha256(item.pixels[0].tobytes()).hexdigest()
        syn = []
        for k in range(self.captions):
            bits = _bits(self.seed, item.sample_id, k, seen)
            words = [_WORDS[bits >> 8 * i & 15] for i in range(4 + bits % 5)]
            syn.append(
                SyntheticText(" ".join(words), -0.5 * len(words), bits % 7 > 0, self._match(" ".join(words), seen, 2))
            )
        return Scores([self._match(text, seen, 0) for text in item.texts], syn)

    def _match(self, text: str, seen: str, shift: float) -> Matched:
        bits = _bits(self.token, text, seen)
        margin = (bits % 4096 - 2048) / 400 + shift
        return Matched(margin, (bits >> 16) % 1000 / 1000, len(text.split()) + 2)


_WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "small",
    "large",
    "dog",
    "cat",
    "star",
    "ring",
    "on",
    "near",
    "tree",
    "house",
    "by",
    "in",
)


def _bits(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
