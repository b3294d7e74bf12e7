"""Fine-tuning for visual dialogue (paper, section 5.5). R rounds of C answers."""

from __future__ import annotations

import torch

from blip.models.dialogue import Dialogue
from blip.objectives.batch import DialogueBatch
from blip.objectives.matching import matching_loss
from blip.objectives.objective import Clock, Objective, Outcome


class DialogueObjective(Objective):
    """Classify answers as true or false, as ITM does captions of an image."""

    def __init__(self, model: Dialogue) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: DialogueBatch, clock: Clock) -> Outcome:
        """Compute the matching loss of a batch."""
        model, choices = self.model, batch.choices
        context = model.context(batch.image, batch.caption_ids, batch.caption_keep)
        logits = model.match(batch.ids, batch.keep, context.expand(len(batch.ids) // len(batch))).float()
        rounds = logits.view(-1, choices, 2)
        loss = matching_loss(torch.cat([rounds[:, 0], rounds[:, 1:].flatten(0, 1)]), positives=len(rounds))
        with torch.no_grad():
            best = (rounds[..., 1] - rounds[..., 0]).argmax(1)
            health = {"answer_accuracy": (best == 0).float().mean()}
        return Outcome({"itm": loss}, health)
