"""Fine-tuning of a captioner (paper, section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass

from blip.models import protocols
from blip.models.blip import Blip, Captioner
from blip.objectives.batch import Batch
from blip.objectives.captioning import caption_pass, captioning_loss, token_accuracy
from blip.objectives.objective import Clock, Objective, Outcome, beyond
from blip.settings import check_fractions


@dataclass(frozen=True)
class CaptionConfig:
    """Settings of fine-tuning a captioner (paper, section 5.2); the prompt is a setting of the data."""

    label_smoothing: float = 0.1
    """Label smoothing of the language-modelling loss."""

    def __post_init__(self) -> None:
        check_fractions(self, "label_smoothing")


class Caption(Objective):
    """LM alone, which turns a pre-trained model into a captioner.

    The prompt at the start of the captions is an input and not learned.
    """

    def __init__(self, model: Blip, config: CaptionConfig) -> None:
        super().__init__()
        protocols.require(model, protocols.Generates)
        self.config = config
        self.model = model

    def untrained(self) -> set[str]:
        """Names of what a `Blip` has beyond a captioner."""
        return beyond(self.model, Captioner)

    def forward(self, batch: Batch, clock: Clock) -> Outcome:
        """Compute the language-modelling loss of a batch."""
        model = self.model
        context = model.context(model.vision(batch.image))
        decode, targets = caption_pass(batch, model.config.text.dec_id, context)
        (states,) = model.med([decode])
        logits = model.med.vocabulary(states).float()
        loss = captioning_loss(logits, targets, self.config.label_smoothing)
        return Outcome({"lm": loss}, {"word_accuracy": token_accuracy(logits, targets)})
