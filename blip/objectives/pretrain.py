"""Pre-training: ITC + ITM + LM (paper, section 3.2). B batch, K candidates for hard negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip import dist
from blip.models import protocols
from blip.models.blip import Blip
from blip.objectives import negatives
from blip.objectives.batch import Batch
from blip.objectives.captioning import caption_pass, captioning_loss
from blip.objectives.contrast import Similarities, partners, recalls
from blip.objectives.matching import Mismatches, match_accuracies, match_logits, matching_loss, matching_passes
from blip.objectives.objective import Clock, Outcome
from blip.objectives.similarity import EmbeddedPair
from blip.objectives.targets import OwnPartner
from blip.objectives.teacher import MomentumContrast, MomentumContrastConfig
from blip.settings import check_fractions


@dataclass(frozen=True)
class PretrainConfig(MomentumContrastConfig):
    """Settings of the three pre-training losses (paper, section 3.2) and their momentum teacher."""

    negative_floor: float = 1e-4
    """Number added to each hard-negative sampling weight, so that no row underflows."""
    label_smoothing: float = 0.1
    """Label smoothing of the language-modelling loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self, "label_smoothing")


class Pretrain(MomentumContrast):
    """ITC + ITM + LM with a momentum teacher and feature queues.

    ITM and LM share one projection of the image and run side by side through the transformer's shared layers.
    """

    config: PretrainConfig

    def __init__(self, model: Blip, config: PretrainConfig) -> None:
        super().__init__(model, config)
        protocols.require(model, protocols.Generates)

    def forward(self, batch: Batch, clock: Clock) -> Outcome:
        """Compute the three losses of a batch."""
        model, config = self.model, self.config
        tokens, student, teacher = self.embed(batch)
        itc, cosines = self.contrast(student, teacher, OwnPartner(), clock)
        context = model.context(tokens)
        mismatches = self._mismatches(student, teacher, cosines)
        own, other = matching_passes(model, batch, tokens, context, mismatches, self.everywhere)
        decode, targets = caption_pass(batch, model.config.text.dec_id, context)
        own_states, other_states, decode_states = model.med([own, other, decode])
        matches = match_logits(model, own_states, other_states)
        word_logits = model.med.vocabulary(decode_states)
        losses = {
            "itc": itc,
            "itm": matching_loss(matches.float(), positives=len(batch)),
            "lm": captioning_loss(word_logits.float(), targets, config.label_smoothing),
        }
        health = recalls(cosines, partners(cosines.image_to_text)) | match_accuracies(matches, len(batch))
        return Outcome(losses, {**health, "temperature": model.temperature.detach().clone()}, teacher)

    def _mismatches(self, student: EmbeddedPair, teacher: EmbeddedPair, cosines: Similarities) -> Mismatches:
        """Draw hard negatives by similarity of student and teacher, from the batch or all processes' batches."""
        i2t, t2i = cosines
        start = 0
        if self.everywhere:
            with torch.no_grad():
                i2t = student.image.vector @ dist.gather(teacher.text.vector).T
                t2i = student.text.vector @ dist.gather(teacher.image.vector).T
            start = dist.rank() * len(i2t)
        same = partners(i2t, start)

        def draw(similarities: Tensor) -> Tensor:
            drawn, _ = negatives.hard_negatives(similarities, self.model.temperature, self.config.negative_floor, same)
            return drawn

        return Mismatches(draw(t2i), draw(i2t))
