"""Negatives of the contrastive loss, and hard negatives of the matching head.

B batch, C candidates, Q queue, M rows pushed, E embedding width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import dist
from blip.objectives.similarity import Embedded, EmbeddedPair

# In the contrastive loss ----------------------------------------------------------------------------------------------


class CandidateBlocks(NamedTuple):
    """The C keys that a batch is compared with, in blocks; the batch's own partners are in the first block."""

    blocks: list[Embedded]
    start: int
    """Index of row 0's partner; row i's is candidate `start + i`."""


class Negatives(Protocol):
    """A source of candidates."""

    def __call__(self, keys: EmbeddedPair, modality: str) -> CandidateBlocks:
        """Collect candidates of one modality, `image` or `text`; `keys` are the batch's own."""


class InBatch:
    """The batches of all processes, with gradient to each (CLIP, section 2.3)."""

    def __call__(self, keys: EmbeddedPair, modality: str) -> CandidateBlocks:
        own: Embedded = getattr(keys, modality)
        return CandidateBlocks([own.map(dist.gather_with_gradient)], dist.rank() * len(own.vector))


class Queued:
    """The process's own batch, then the last Q vectors of all processes (MoCo; ALBEF and BLIP, section 3.2)."""

    def __init__(self, image: Queue, text: Queue) -> None:
        self.image, self.text = image, text

    def __call__(self, keys: EmbeddedPair, modality: str) -> CandidateBlocks:
        queue: Queue = getattr(self, modality)
        return CandidateBlocks([getattr(keys, modality), Embedded(queue.features)], 0)

    def push(self, keys: EmbeddedPair) -> None:
        """Add the keys of all processes' batches to the queues."""
        self.image.push(dist.gather(keys.image.vector))
        self.text.push(dist.gather(keys.text.vector))


class _Ring(nn.Module):
    """A ring buffer of the last Q rows; rows not yet pushed keep their initial values."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Overwrite the oldest rows with features (M, ...); if M > Q, only the last Q count."""
        size = len(self.features)
        if size == 0:
            return
        features = features[-size:]
        index = (self.next + torch.arange(len(features), device=features.device)) % size
        self.features.index_copy_(0, index, features.to(self.features.dtype))
        self.next.copy_((self.next + len(features)) % size)


class Queue(_Ring):
    """The last Q features (Q, E) of one modality; random directions until it is full."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(F.normalize(torch.randn(size, width), dim=1))


class IdQueue(_Ring):
    """Image ids (Q,) of the features in queues of the same size; -100, no image's id, until it is full."""

    def __init__(self, size: int) -> None:
        super().__init__(torch.full((size,), -100))


# For the matching head ------------------------------------------------------------------------------------------------


@torch.no_grad()
def hard_negatives(cosines: Tensor, temperature: Tensor, floor: float, same: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for each row of cosines (B, C) one negative, the likelier the more similar it is.

    Candidates that `same` (B, C) bool marks, the row's partner and other pairs of its image, are never drawn. `floor`
    is added to every weight; a row whose weights all underflow draws evenly. Returns (B,) indices into C, and (B,)
    bool: False where all candidates are marked and the index is meaningless. ValueError if C is 1.
    """
    if cosines.shape[1] < 2:
        raise ValueError(
            "matching draws negatives from the batch, which needs at least 2 pairs: set train.batch_size to 2 or more"
        )
    weights = F.softmax(cosines.float() / temperature, dim=1) + floor
    # Rows of NaN draw evenly, too. Their losses are NaN, which the training loop handles.
    weights = weights.masked_fill_(same, 0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, (~same).float())
    has_negative = ~same.all(1)
    weights = torch.where(has_negative[:, None], weights, 1.0)
    return draw(weights), has_negative


def draw(weights: Tensor) -> Tensor:
    """Draw an index for each row of weights (B, C) -> (B,), as torch.multinomial does, which waits for the host."""
    return (weights / torch.empty_like(weights).exponential_()).argmax(1)
