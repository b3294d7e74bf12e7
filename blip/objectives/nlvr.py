"""Fine-tuning for NLVR2 (paper, section 5.4)."""

from __future__ import annotations

import torch.nn.functional as F

from blip.models.blip import starting_with
from blip.models.nlvr import Nlvr
from blip.objectives.batch import SentenceBatch
from blip.objectives.objective import Clock, Objective, Outcome


class NlvrObjective(Objective):
    """Classify whether a sentence is true of several images."""

    def __init__(self, model: Nlvr) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SentenceBatch, clock: Clock) -> Outcome:
        """Compute the cross-entropy of a batch."""
        model = self.model
        ids = starting_with(batch.ids, model.config.text.enc_id)
        logits = model.judge(ids, batch.keep, model.contexts(batch.image)).float()
        accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        return Outcome({"nlvr": F.cross_entropy(logits, batch.labels)}, {"accuracy": accuracy})
