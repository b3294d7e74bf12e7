"""Interface of objectives for the training loop: a batch and the clock in, named losses out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Clock(NamedTuple):
    """Progress of a run. Every schedule is a function of it, so that no schedule has a state to save."""

    step: int = 0
    """Optimizer steps done."""
    epoch: float = 0.0
    """Passes over the data so far."""
    progress: float = 0.0
    """Share of the run's steps that are done, 0 to 1."""


class Outcome(NamedTuple):
    """Results of an objective for one batch."""

    losses: dict[str, Tensor]
    """Named scalar losses; the loop adds them up."""
    health: dict[str, Tensor]
    """Named detached scalars to log."""
    carry: Any = None
    """Data of this batch for `after_step`."""


class Objective(nn.Module):
    """A model and its losses. `forward` has no side effects; state besides the weights changes in `after_step`."""

    model: nn.Module
    """Model that is trained, saved and evaluated."""

    def forward(self, batch: Any, clock: Clock) -> Outcome:
        """Compute the losses of a batch."""
        raise NotImplementedError

    def untrained(self) -> set[str]:
        """Names of parameters that get no gradient although they are not frozen; none by default.

        Several processes do not wait for the gradients of these.
        """
        return set()

    def after_step(self, carries: list[Any]) -> None:
        """Update other state after an optimizer step, from the `carry` of its batches; does nothing by default."""


def beyond(model: nn.Module, part: type[nn.Module], *used: str) -> set[str]:
    """Names under `model.` of the parameters of a model that a part, such as a `Captioner`, would not have.

    Those `used` all the same are left out.
    """
    with torch.device("meta"):
        names = {name for name, _ in part(model.config, model.options).named_parameters()}
    return {f"model.{name}" for name, _ in model.named_parameters() if name not in names | set(used)}
