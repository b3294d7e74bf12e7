"""Fine-tuning for retrieval, and CapFilt's filter: ITC + ITM (paper, sections 3.3, 5.1). B batch, Q queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip import dist
from blip.models.blip import Blip, Matcher
from blip.objectives import negatives
from blip.objectives.batch import Batch
from blip.objectives.contrast import recalls
from blip.objectives.matching import Mismatches, match_accuracies, match_logits, matching_loss, matching_passes
from blip.objectives.negatives import IdQueue
from blip.objectives.objective import Clock, Outcome, beyond
from blip.objectives.similarity import EmbeddedPair
from blip.objectives.targets import SameImage
from blip.objectives.teacher import MomentumContrast, MomentumContrastConfig


@dataclass(frozen=True)
class RetrievalConfig(MomentumContrastConfig):
    """Settings of fine-tuning for retrieval, which also yields CapFilt's filter: ITC and ITM (paper, section 5.1)."""

    alpha_ramp_epochs: float = 1.0
    """Epochs over which alpha rises linearly from 0."""


class Seen(NamedTuple):
    """Data of a batch for the retrieval objective's queues."""

    features: EmbeddedPair
    """Embeddings of the teacher."""
    image_ids: Tensor
    """(B,) int64 image ids."""


class Retrieval(MomentumContrast):
    """ITC + ITM where all pairs of one image match: fine-tuning for retrieval, and CapFilt's filter.

    `Batch.image_ids` says which pairs are of one image. They share the contrastive target, over batch and queue, and
    are not drawn as negatives. If all pairs are of one image there is no negative, and the matching loss has none.
    """

    config: RetrievalConfig

    def __init__(self, model: Blip, config: RetrievalConfig) -> None:
        super().__init__(model, config)
        self.id_queue = IdQueue(config.queue_size)

    def untrained(self) -> set[str]:
        """Names of what a `Blip` has beyond a matcher."""
        return beyond(self.model, Matcher)

    def forward(self, batch: Batch, clock: Clock) -> Outcome:
        """Compute the two losses of a batch. ValueError for a batch without image ids."""
        if batch.image_ids is None:
            raise ValueError("the retrieval objective needs Batch.image_ids: which pairs are of one image")
        model, ids = self.model, batch.image_ids
        tokens, student, teacher = self.embed(batch)
        same = ids[:, None] == torch.cat([ids, self.id_queue.features])
        itc, cosines = self.contrast(student, teacher, SameImage(same), clock)
        context = model.context(tokens)
        mismatches, has_negative = self._mismatches(ids, student)
        passes = matching_passes(model, batch, tokens, context, mismatches, self.everywhere)
        matches = match_logits(model, *model.med(passes))
        counted = torch.cat([torch.ones_like(ids, dtype=torch.bool), has_negative])
        losses = {"itc": itc, "itm": matching_loss(matches.float(), len(batch), counted)}
        health = recalls(cosines, same[:, : len(batch)]) | match_accuracies(matches, len(batch), counted)
        health["temperature"] = model.temperature.detach().clone()
        health["itm_without_negative"] = 1 - has_negative.float().mean()
        return Outcome(losses, health, Seen(teacher, ids))

    @torch.no_grad()
    def _mismatches(self, ids: Tensor, student: EmbeddedPair) -> tuple[Mismatches, Tensor]:
        """Draw hard negatives of other images -> these, and whether there are any (2 B,): by text, then by image."""
        # Drawn by the student's own similarities, as in the original; in pre-training by student and teacher.
        images, texts, others = student.image.vector, student.text.vector, ids
        if self.everywhere:
            images, texts, others = dist.gather(images), dist.gather(texts), dist.gather(ids)
        same, temperature, floor = ids[:, None] == others, self.model.temperature, self.config.negative_floor
        image, text_has_negative = negatives.hard_negatives(student.text.vector @ images.T, temperature, floor, same)
        text, image_has_negative = negatives.hard_negatives(student.image.vector @ texts.T, temperature, floor, same)
        return Mismatches(image, text), torch.cat([text_has_negative, image_has_negative])

    @torch.no_grad()
    def after_step(self, carries: list[Seen]) -> None:
        """Update as in pre-training, and push the image ids together with the features."""
        super().after_step([seen.features for seen in carries])
        for seen in carries:
            self.id_queue.push(dist.gather(seen.image_ids))
