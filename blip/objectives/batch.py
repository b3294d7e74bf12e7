"""Batches: what a training step is given. B batch, T text tokens, S image side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


@dataclass
class Bad:
    """A sample that could not be read, and why; it was replaced by another."""

    key: str
    reason: str


class Movable:
    """A dataclass whose tensors go together; what else it holds stays as it is."""

    def to(self, device: torch.device) -> Self:
        """A copy with its tensors there."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy with its tensors in memory that a GPU can fetch from."""
        return self._with(Tensor.pin_memory)

    def _with(self, move: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass
class Batch(Movable):
    """B images with one text each, texts padded on the right to the longest."""

    image: Tensor
    """(B, 3, S, S) float32, normalised."""
    ids: Tensor
    """(B, T) int64: [CLS] word pieces [SEP], then padding."""
    keep: Tensor
    """(B, T) bool: False at padding; kept tokens are a prefix of every row."""
    keys: list[str]
    """Where each pair comes from, for people: `file:row` or `shard/member`."""
    bad: list[Bad] = field(default_factory=list)
    """Samples that were replaced while this batch was made."""
    prompt: int = 0
    """Word pieces after the first token that every text begins with: given to the decoder, not learned."""
    image_ids: Tensor | None = None
    """(B,) int64, 0 or more: pairs of one image have the same, wherever in the data they are."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class QuestionBatch(Batch):
    """B images with a question each, and the human answers: A in all, those of a question beside each other."""

    answer_ids: Tensor = field(kw_only=True)
    """(A, U) int64: [CLS] word pieces [SEP], then padding."""
    answer_keep: Tensor = field(kw_only=True)
    """(A, U) bool, as `keep`."""
    weights: Tensor = field(kw_only=True)
    """(A,) float32, how much an answer counts."""
    question: Tensor = field(kw_only=True)
    """(A,) int64, which of the B questions is answered."""


@dataclass
class DialogueBatch(Movable):
    """B dialogues with K rows each, texts padded on the right to the longest."""

    image: Tensor
    """(B, 3, S, S) float32, normalised."""
    caption_ids: Tensor
    """(B, C) int64: [CLS] word pieces [SEP], then padding."""
    caption_keep: Tensor
    """(B, C) bool: False at padding."""
    ids: Tensor
    """(B * K, T) int64, the rows of one dialogue beside each other."""
    keep: Tensor
    """(B * K, T) bool."""
    choices: int
    """Rows of one round: the true answer, then false ones; K is a multiple of it."""
    keys: list[str]
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image)


@dataclass
class SentenceBatch(Movable):
    """B sentences about K images each, texts padded on the right to the longest."""

    image: Tensor
    """(B, K, 3, S, S) float32, normalised."""
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
