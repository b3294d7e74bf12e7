"""Batches of training steps. B batch, T text tokens, S image side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from blip.nn.pixels import normalise


@dataclass
class Bad:
    """A sample that could not be read and was replaced by another, and the reason."""

    key: str
    reason: str


class Movable:
    """A dataclass whose tensors move between devices together."""

    image: Tensor

    def to(self, device: torch.device) -> Self:
        """Copy with the tensors on `device`, where images of uint8 are normalised."""
        moved = self._with(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.image.dtype == torch.uint8:
            moved.image = normalise(moved.image)
        return moved

    def pin_memory(self) -> Self:
        """Copy with the tensors in pinned memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, move: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass
class Batch(Movable):
    """B images with one text each, texts padded on the right to the longest."""

    image: Tensor
    """(B, 3, S, S) uint8, or normalised float32 as objectives take it: `to` makes one of the other."""
    ids: Tensor
    """(B, T) int64: [CLS] word pieces [SEP], then padding."""
    keep: Tensor
    """(B, T) bool: False at padding; tokens are a prefix of every row."""
    keys: list[str]
    """Source of each pair, for messages: `file:row` or `shard/member`."""
    bad: list[Bad] = field(default_factory=list)
    """Samples that were unreadable and replaced in this batch."""
    prompt: int = 0
    """Number of word pieces after the first token that are a prompt: given to the decoder, not learned."""
    image_ids: Tensor | None = None
    """(B,) int64, 0 or more: equal for all pairs of one image, wherever in the data."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class QuestionBatch(Batch):
    """B images with a question each, and A human answers in all, those of a question side by side."""

    answer_ids: Tensor = field(kw_only=True)
    """(A, U) int64: [CLS] word pieces [SEP], then padding."""
    answer_keep: Tensor = field(kw_only=True)
    """(A, U) bool, as `keep`."""
    weights: Tensor = field(kw_only=True)
    """(A,) float32 weights of the answers."""
    question: Tensor = field(kw_only=True)
    """(A,) int64 index of the question that is answered."""


@dataclass
class DialogueBatch(Movable):
    """B dialogues with K rows each, texts padded on the right to the longest."""

    image: Tensor
    """(B, 3, S, S) uint8, or normalised float32 as objectives take it: `to` makes one of the other."""
    caption_ids: Tensor
    """(B, C) int64: [CLS] word pieces [SEP], then padding."""
    caption_keep: Tensor
    """(B, C) bool: False at padding."""
    ids: Tensor
    """(B * K, T) int64, the rows of one dialogue side by side."""
    keep: Tensor
    """(B * K, T) bool."""
    choices: int
    """Rows of one round, a divisor of K: the true answer, then false ones."""
    keys: list[str]
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image)


@dataclass
class SentenceBatch(Movable):
    """B sentences about K images each, texts padded on the right to the longest."""

    image: Tensor
    """(B, K, 3, S, S) uint8 or float32, as in `Batch`."""
    ids: Tensor
    """(B, T) int64: [CLS] word pieces [SEP], then padding."""
    keep: Tensor
    """(B, T) bool: False at padding."""
    labels: Tensor
    """(B,) int64: 1 where the sentence is true."""
    keys: list[str]
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)
