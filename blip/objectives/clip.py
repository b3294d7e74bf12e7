"""CLIP's objective ("Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blip import dist
from blip.models import protocols
from blip.models.blip import Blip, Towers
from blip.objectives.batch import Batch
from blip.objectives.contrast import Contrast, check_temperature, embed, partners, recalls
from blip.objectives.negatives import InBatch
from blip.objectives.objective import Clock, Objective, Outcome, beyond
from blip.objectives.similarity import cosine
from blip.objectives.targets import OwnPartner


@dataclass(frozen=True)
class ClipConfig:
    """Settings of CLIP's contrast of images and texts within the batch."""

    temperature_min: float = 0.01
    """Lower clamp of the learned temperature."""
    temperature_max: float = 0.5
    """Upper clamp of the learned temperature."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature_min, self.temperature_max)


class Clip(Objective):
    """The contrast of a model's two towers within the batches of all processes, without teacher or queue."""

    def __init__(self, model: Blip, config: ClipConfig) -> None:
        super().__init__()
        protocols.require(model, protocols.Embeds)
        self.config = config
        self.model = model
        self.contrast = Contrast(cosine, InBatch(), OwnPartner())

    def untrained(self) -> set[str]:
        """Names of what a `Blip` has beyond the two towers."""
        return beyond(self.model, Towers, "temperature")

    def forward(self, batch: Batch, clock: Clock) -> Outcome:
        """Compute the contrastive loss of a batch."""
        _, pair = embed(self.model, batch)
        temperature = self.model.temperature
        loss, cosines = self.contrast(pair, pair, temperature)
        right = partners(cosines.image_to_text, dist.rank() * len(batch))
        return Outcome({"itc": loss}, {**recalls(cosines, right), "temperature": temperature.detach().clone()})

    @torch.no_grad()
    def after_step(self, carries: list[None]) -> None:
        """Clamp the temperature."""
        self.model.temperature.clamp_(self.config.temperature_min, self.config.temperature_max)
