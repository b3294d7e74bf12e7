"""Randomness as a function of a key alone, so that a resumed run draws the same as an uninterrupted one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch

_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """Purpose of a key: two uses of one (seed, epoch, index) must not draw the same bits.

    Every run that is resumed relies on these numbers, so they never change. They differ within one kind of sample; two
    kinds may share one, whose second name is then an alias.
    """

    ROW_ORDER = 0
    """The order of a source's rows, for each pass over it."""
    EPOCH_ORDER = 1
    """The order of an epoch, in which all sources are mixed."""
    CAPTION = 2
    """Choice among an image's captions."""
    REPLACEMENT = 3
    """Choice of the row that replaces an unusable one."""
    AUGMENTATION = 4
    """Crop, mirror image and RandAugment of an image with a caption."""

    SHARD_ORDER = 10
    """The order of a stream's shards."""
    SHUFFLE_BUFFER = 11
    """Choice of the place of a stream's shuffle buffer that is emptied."""
    SOURCE = 12
    """Choice of the source of a stream's next record."""

    IMAGE_ORDER = 100
    """The order of the images of a sentence about several."""
    SENTENCE_AUGMENTATION = 102
    """Augmentation of the first image of such a sentence; 10 more for each further one."""
    HELD_OUT = 103
    """Choice of the held-out sentences where one file is split in two."""

    QUESTION_AUGMENTATION = 200
    """Augmentation of an image with a question."""

    ROUNDS = 200
    """Choice of the rounds of a dialogue."""
    NEGATIVES = 201
    """Choice of negatives, the wrong answers shown."""
    DIALOGUE_AUGMENTATION = 202
    """Augmentation of an image with a dialogue."""
    HARD_NEGATIVES = 203
    """Choice of hard negatives, the wrong answers that resemble the right one."""

    CONCEPTS = 300
    """Choice of the rows that a selection balanced over concepts keeps."""


def mix(*values: int) -> int:
    """64 well-mixed bits of some integers (splitmix64); the order of the integers matters."""
    state = 0
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permutation(n: int, *key: int) -> np.ndarray:
    """The numbers 0 to n-1, int64, in an order fixed by the key, the same under every version of numpy."""
    h = np.arange(n, dtype=np.uint64)
    h *= np.uint64(0x9E3779B97F4A7C15)
    h += np.uint64(mix(*key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h ^= h >> np.uint64(shift)
        h *= np.uint64(factor)
    h ^= h >> np.uint64(31)
    return np.argsort(h, kind="stable").astype(np.int64, copy=False)


@contextlib.contextmanager
def scoped(*key: int) -> Iterator[None]:
    """Seed Python's and torch's CPU generators for the body, and put back their state afterwards.

    torchvision and timm draw from the global generators; this keeps their draws from depending on, or leaking into,
    anything else.
    """
    python, cpu = random.getstate(), torch.default_generator.get_state()
    seed = mix(*key)
    random.seed(seed)
    torch.default_generator.manual_seed(seed >> 1)
    try:
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(cpu)
