"""Parts of a model that are locked for a time or learn more slowly, as a function of the clock.

LiT locks the image tower to the end, Chinese-CLIP's first stage for a share of the run; a pre-trained tower may learn
at a tenth of the rate of the rest. Nothing is saved: a run that continues finds by the clock what is locked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blip.settings import check_positive, require

if TYPE_CHECKING:
    from torch import nn

    from blip.objectives.objective import Clock, Objective


@dataclass(frozen=True)
class Tower:
    """A part of the model that is locked for a time or learns at another rate than the rest."""

    part: str
    """Name of a module in the model, `vision` or `med.blocks`, or of some of its members: `vision.vit.blocks[0:6]`."""
    locked_until: float = 0.0
    """Share of the run's steps during which the part is locked: 0 never, 1 to the end."""
    lr_scale: float = 1.0
    """Learning-rate factor of the part."""

    def __post_init__(self) -> None:
        require(0 <= self.locked_until <= 1, f"locked_until must be in [0, 1], got {self.locked_until}")
        check_positive(self.lr_scale, "lr_scale")


class TowerSchedule:
    """The towers of a run, found in its model.

    A locked part gets no gradient, so that the optimizer passes it over (no decay, no moments), and is in evaluation
    mode, without dropout. It has to be in the optimizer, and seen by DistributedDataParallel, before it is locked.
    """

    def __init__(self, objective: Objective, towers: Sequence[Tower]) -> None:
        """ValueError for a part that is not there or shared by two towers, or if nothing is left to train."""
        self.towers = [(tower, list(_modules(objective.model, tower.part))) for tower in towers]
        self.parameters = [
            [p for module in modules for p in module.parameters() if p.requires_grad] for _, modules in self.towers
        ]
        self.locked = [False] * len(self.towers)
        for tower, own in zip(towers, self.parameters, strict=True):
            require(bool(own), f"train.towers: part {tower.part!r} has no weights to train")
        named = [p for parameters in self.parameters for p in parameters]
        require(len(named) == len(set(named)), "train.towers: two parts have weights in common; name each weight once")
        locked = {p for one, own in zip(towers, self.parameters, strict=True) if one.locked_until > 0 for p in own}
        learning = [p for p in objective.parameters() if p.requires_grad and p not in locked]
        require(bool(learning) or not towers, "train.towers: every part is locked at first; nothing is left to train")

    def scales(self) -> dict[nn.Parameter, float]:
        """Learning-rate factor of each parameter that belongs to a tower."""
        return {p: tower.lr_scale for (tower, _), own in zip(self.towers, self.parameters, strict=True) for p in own}

    def set(self, clock: Clock) -> list[str]:
        """Lock and unlock parts by the clock; return the changes as sentences for the log."""
        changes = []
        for i, (tower, modules) in enumerate(self.towers):
            locked = clock.progress < tower.locked_until
            if locked == self.locked[i]:
                continue
            self.locked[i] = locked
            for parameter in self.parameters[i]:
                parameter.requires_grad_(not locked)
            for module in modules:
                module.train(not locked)
            changes.append(f"{tower.part} is {'locked' if locked else 'unlocked'}")
        return changes


def _modules(model: nn.Module, part: str) -> Iterator[nn.Module]:
    name, first, last = re.fullmatch(r"(.*?)(?:\[(\d*):(\d*)\])?", part).groups()
    try:
        module = model.get_submodule(name)
        if first is None:
            yield module
        else:
            yield from list(module)[slice(*(int(end) if end else None for end in (first, last)))]
    except (AttributeError, TypeError):
        listed = ", ".join(child for child, _ in model.named_children())
        raise ValueError(f"train.towers: the model has no part {part!r}; its parts are {listed}") from None
