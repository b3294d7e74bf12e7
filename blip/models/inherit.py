"""Where the first weights of a task model come from: an account of every tensor, never a silent skip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from blip.models.blip import Blip, Captioner, Matcher


@dataclass(frozen=True)
class WeightOrigin:
    """What becomes of the tensors of a pre-trained `Blip`, and what each of a task model starts from."""

    copied: dict[str, str]
    """Names in the task model -> the name in `Blip` whose values they take."""
    fresh: dict[str, str]
    """Names in the task model that keep their random first values -> why."""
    left: dict[str, str]
    """Names in `Blip` that the task has no use for -> why."""


def copy(model: nn.Module, blip: Blip | Captioner | Matcher, origin: WeightOrigin) -> None:
    """Give a task model its first weights. ValueError unless every tensor of both is accounted for and fits."""
    ours, theirs = model.state_dict(), blip.state_dict()
    named = set(origin.copied) | set(origin.fresh)
    _refuse("the task model has", set(ours) ^ named | set(origin.copied) & set(origin.fresh))
    # A captioner or a matcher lacks some that would be left out.
    left = set(origin.left) if isinstance(blip, Blip) else set(origin.left) & set(theirs)
    _refuse("the pre-trained model has", set(theirs) ^ (set(origin.copied.values()) | left))
    for name, source in origin.copied.items():
        if ours[name].shape != theirs[source].shape:
            raise ValueError(f"{name} is {list(ours[name].shape)}, {source} is {list(theirs[source].shape)}")
    model.load_state_dict({name: theirs[source] for name, source in origin.copied.items()}, strict=False)


def _refuse(where: str, names: set[str]) -> None:
    if names:
        some = sorted(names)
        raise ValueError(f"{where} {', '.join(some[:3])}{', ...' * (len(some) > 3)} that is not accounted for once")


def under(prefix: str, state: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """Names of a part's tensors under `prefix` -> the same under `source`: what `WeightOrigin.copied` says of it."""
    return {f"{prefix}.{name}": f"{source}.{name}" for name in state}


def generating(layers: int) -> list[str]:
    """Names in `Blip` of what only generates: the causal self-attentions and the vocabulary's head."""
    own = ("causal.qkv", "causal.out", "causal_norm")
    parts = [f"blocks.{i}.{name}" for i in range(layers) for name in own] + ["head_dense", "head_norm"]
    return ["med.head_bias", *(f"med.{part}.{kind}" for part in parts for kind in ("weight", "bias"))]
