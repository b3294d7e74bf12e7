"""What the training loop knows of an objective: a batch and the clock in, named losses out."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Clock(NamedTuple):
    """Where a run is. Every schedule is a function of it, so that none has to be saved."""

    step: int = 0
    """Optimizer steps done."""
    epoch: float = 0.0
    """Passes over the data so far."""
    progress: float = 0.0
    """Share of the run's steps that are done, 0 to 1."""


class Outcome(NamedTuple):
    """What an objective says of one batch."""

    losses: dict[str, Tensor]
    """Named scalars; the loop adds them up."""
    health: dict[str, Tensor]
    """Named detached scalars worth watching."""
    carry: Any = None
    """What `after_step` needs of this batch."""


class Objective(nn.Module):
    """A model and what it learns. `forward` changes nothing: what moves beside the weights moves in `after_step`."""

    model: nn.Module
    """What is trained, saved and evaluated."""

    def forward(self, batch: Any, clock: Clock) -> Outcome:
        """The losses of a batch."""
        raise NotImplementedError

    def after_step(self, carries: list[Any]) -> None:
        """Follow an optimizer step, given what its batches carry; nothing unless overridden."""
