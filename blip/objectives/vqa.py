"""Fine-tuning of question answering (paper, section 5.3). B questions, A answers, N tokens to predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from blip.models.blip import starting_with
from blip.models.vqa import Vqa
from blip.objectives.batch import QuestionBatch
from blip.objectives.captioning import IGNORED, decoding_pass, token_accuracy
from blip.objectives.objective import Clock, Objective, Outcome
from blip.settings import check_fractions


@dataclass(frozen=True)
class VqaConfig:
    """Settings of fine-tuning for question answering (paper, section 5.3)."""

    label_smoothing: float = 0.1
    """Label smoothing of the loss of an answer's words."""

    def __post_init__(self) -> None:
        check_fractions(self, "label_smoothing")


class VqaObjective(Objective):
    """Language modelling of the human answers, each by its weight."""

    def __init__(self, model: Vqa, config: VqaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model

    def forward(self, batch: QuestionBatch, clock: Clock) -> Outcome:
        """Compute the loss of a batch, per question."""
        model, text = self.model, self.model.config.text
        image = model.question.context(model.vision(batch.image))
        questions = model.context(starting_with(batch.ids, text.enc_id), batch.keep, image)
        context = questions[batch.question]
        decode, targets = decoding_pass(batch.answer_ids, batch.answer_keep, text.dec_id, context)
        weights = decode.layout.pack_ids(batch.weights[:, None].expand_as(targets))
        targets = decode.layout.pack_ids(targets)
        (states,) = model.answer([decode])
        logits = model.answer.vocabulary(states).float()
        loss = answering_loss(logits, targets, weights, len(batch), self.config.label_smoothing)
        return Outcome({"vqa": loss}, {"word_accuracy": token_accuracy(logits, targets)})


def answering_loss(logits: Tensor, targets: Tensor, weights: Tensor, questions: int, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy of logits (N, vocabulary), summed with weights (N,) over the words of answers.

    The sum is divided by the number of questions, as in the original, so long answers count more than short ones.
    """
    each = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none")
    return (weights * each).sum() / questions
