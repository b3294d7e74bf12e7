"""The momentum teacher, and the objective that learns from it by contrast (section 3.2, after MoCo and ALBEF).

B batch, K candidates of the batch itself, P image tokens, V vision width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from blip import dist
from blip.models import protocols
from blip.models.blip import Blip, Towers
from blip.objectives.batch import Batch
from blip.objectives.contrast import Contrast, Similarities, check_temperature, embed
from blip.objectives.negatives import Queue, Queued
from blip.objectives.objective import Clock, Objective
from blip.objectives.similarity import EmbeddedPair, cosine
from blip.objectives.targets import Distilled, Target
from blip.settings import check_rates, require

_MOST_QUEUED = 1 << 22
"""Largest allowed queue size."""


class Teacher(nn.Module):
    """An exponential moving average of a student's two towers; never trained, never saved with the model."""

    def __init__(self, student: Towers) -> None:
        super().__init__()
        self.towers = Towers(student.config, student.options).requires_grad_(False)
        self.update(student, momentum=0.0)

    @torch.no_grad()
    def update(self, student: Towers, momentum: float) -> None:
        """Move every parameter: teacher = momentum * teacher + (1 - momentum) * student."""
        source = dict(student.named_parameters())
        mine, theirs = zip(*((p, source[name]) for name, p in self.towers.named_parameters()), strict=True)
        torch._foreach_lerp_(list(mine), list(theirs), 1 - momentum)


@dataclass(frozen=True)
class MomentumContrastConfig:
    """Settings of a momentum teacher, its queues and hard negatives."""

    queue_size: int = 57600
    """Size of the queue of momentum features of each modality; 0 for none."""
    momentum: float = 0.995
    """Decay of the teacher's moving average, per step."""
    alpha: float = 0.4
    """Weight of the teacher's soft targets in the contrastive loss."""
    alpha_ramp_epochs: float = 2.0
    """Epochs over which alpha rises linearly from 0."""
    temperature_min: float = 0.001
    """Lower clamp of the learned temperature."""
    temperature_max: float = 0.5
    """Upper clamp of the learned temperature."""
    negative_floor: float = 0.0
    """Number added to each hard-negative sampling weight; with 0 a row that underflows draws evenly."""
    negatives_all_ranks: bool = False
    """Draw hard negatives from the batches of all processes, not only the local one."""
    teacher_dropout: bool = False
    """Leave dropout on in the teacher (2022: true)."""

    def __post_init__(self) -> None:
        require(self.queue_size >= 0, f"queue_size must be 0 or more, got {self.queue_size}")
        most = f"queue_size must be at most {_MOST_QUEUED:,}, got {self.queue_size}"
        require(self.queue_size <= _MOST_QUEUED, most)
        require(0 <= self.momentum <= 1, f"momentum must be in [0, 1], got {self.momentum}")
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        check_rates(self, "alpha_ramp_epochs", "negative_floor")
        check_temperature(self.temperature_min, self.temperature_max)


class MomentumContrast(Objective):
    """The two towers of a `Blip`, which learn from their momentum teacher by contrast with its features and queues."""

    def __init__(self, model: Blip, config: MomentumContrastConfig) -> None:
        super().__init__()
        protocols.require(model, protocols.Embeds, protocols.Matches)
        self.config = config
        self.model = model
        self.teacher = Teacher(model)
        self.image_queue = Queue(config.queue_size, model.config.embed_dim)
        self.text_queue = Queue(config.queue_size, model.config.embed_dim)
        self.negatives = Queued(self.image_queue, self.text_queue)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.train(mode and self.config.teacher_dropout)
        return self

    def embed(self, batch: Batch) -> tuple[Tensor, EmbeddedPair, EmbeddedPair]:
        """Compute the student's image tokens (B, P, V), its embeddings and the teacher's."""
        tokens, student = embed(self.model, batch)
        with torch.no_grad():
            _, teacher = embed(self.teacher.towers, batch)
        return tokens, student, teacher

    def contrast(
        self, student: EmbeddedPair, teacher: EmbeddedPair, target: Target, clock: Clock
    ) -> tuple[Tensor, Similarities]:
        """Compute ITC and the batch's cosines (B, B); the clock sets the weight of the teacher's soft targets."""
        config = self.config
        ramp = config.alpha_ramp_epochs
        alpha = config.alpha * min(1.0, clock.epoch / ramp) if ramp else config.alpha
        contrast = Contrast(cosine, self.negatives, Distilled(target, alpha))
        return contrast(student, teacher, self.model.temperature, teacher)

    @property
    def everywhere(self) -> bool:
        """Whether hard negatives come from other processes, too."""
        return self.config.negatives_all_ranks and dist.world() > 1

    @torch.no_grad()
    def after_step(self, carries: list[EmbeddedPair]) -> None:
        """Clamp the temperature, update the teacher, push the teacher's features of the step."""
        config = self.config
        self.model.temperature.clamp_(config.temperature_min, config.temperature_max)
        self.teacher.update(self.model, config.momentum)
        for features in carries:
            self.negatives.push(features)
