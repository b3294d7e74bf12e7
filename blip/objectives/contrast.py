"""Contrastive loss, built from a similarity, a source of negatives and a target.

B batch, C candidates, K candidates of the first block (B, or the batches of all processes), P image tokens, V width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip.models.blip import Towers
from blip.objectives.batch import Batch
from blip.objectives.negatives import Negatives
from blip.objectives.similarity import Embedded, EmbeddedPair, Similarity
from blip.objectives.targets import Target
from blip.settings import require


class Similarities(NamedTuple):
    """The student's similarities (B, K) with the first block of candidates: images with texts, texts with images."""

    image_to_text: Tensor
    text_to_image: Tensor


@dataclass(frozen=True)
class Contrast:
    """Cross-entropy of both directions, images among texts and texts among images.

    CLIP is `Contrast(cosine, InBatch(), OwnPartner())`; BLIP's ITC is that of `Queued(...)` negatives and the target
    `Distilled(OwnPartner(), alpha)`. Autocast is off.
    """

    similarity: Similarity
    negatives: Negatives
    target: Target

    def __call__(
        self, student: EmbeddedPair, keys: EmbeddedPair, temperature: Tensor, teacher: EmbeddedPair | None = None
    ) -> tuple[Tensor, Similarities]:
        """Compute the scalar loss of a student's batch against `keys`, and its similarities before the temperature.

        The teacher's logits, which `Distilled` needs, are divided by the student's temperature, too.
        """
        with torch.autocast(student.image.vector.device.type, enabled=False):
            slow_image, slow_text = teacher or (None, None)
            i2t, i2t_loss = self._one_direction(student.image, slow_image, keys, "text", temperature)
            t2i, t2i_loss = self._one_direction(student.text, slow_text, keys, "image", temperature)
        return (i2t_loss + t2i_loss) / 2, Similarities(i2t, t2i)

    def _one_direction(
        self, query: Embedded, teacher: Embedded | None, keys: EmbeddedPair, modality: str, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = len(query.vector)
        candidates = self.negatives(keys, modality)
        # One product per block serves student and teacher, and a queue is never copied.
        both = query if teacher is None else query.above(teacher)
        scores = torch.cat([self.similarity(both, block) for block in candidates.blocks], dim=1)
        own, slow = scores[:batch], scores[batch:]
        logits = own / temperature
        expected = self.target(logits, candidates.start, None if teacher is None else slow / temperature)
        # Targets sum to 1, so the cross-entropy is logsumexp minus the expected logit.
        return own[:, : len(candidates.blocks[0].vector)], (logits.logsumexp(1) - expected).mean()


@torch.no_grad()
def recalls(similarities: Similarities, same: Tensor) -> dict[str, Tensor]:
    """Share of rows whose most similar candidate is a correct one, which `same` (B, K) bool marks."""
    return {
        f"itc_recall_{name}": same.gather(1, scores.argmax(1)[:, None]).float().mean()
        for name, scores in zip(("i2t", "t2i"), similarities, strict=True)
    }


def partners(similarities: Tensor, start: int = 0) -> Tensor:
    """Similarities (B, K) -> (B, K) bool: True in column `start + i` of row i, its partner."""
    return torch.ones_like(similarities, dtype=torch.bool).triu(start).tril(start)


def embed(towers: Towers, batch: Batch) -> tuple[Tensor, EmbeddedPair]:
    """Compute image tokens (B, P, V) and joint embeddings of a batch."""
    tokens = towers.vision(batch.image)
    return tokens, EmbeddedPair(
        Embedded(towers.embed_image(tokens)), Embedded(towers.embed_text(batch.ids, batch.keep))
    )


def check_temperature(low: float, high: float) -> None:
    """Raise ValueError unless 0 < low <= high < infinity."""
    ordered = 0 < low <= high < float("inf")
    require(ordered, f"expected 0 < temperature_min <= temperature_max, got {low} and {high}")
