"""Initial weights of a task model from a pre-trained one, with an account of every tensor of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from blip.models.blip import Blip, Captioner, Matcher


@dataclass(frozen=True)
class WeightOrigin:
    """Sources of a task model's initial weights in a pre-trained `Blip`."""

    copied: dict[str, str]
    """Names in the task model -> names in `Blip` of the values that are copied."""
    fresh: dict[str, str]
    """Names in the task model of weights that stay random -> the reason."""
    unused: dict[str, str]
    """Names in `Blip` of weights that the task does not use -> the reason."""


def copy(model: nn.Module, blip: Blip | Captioner | Matcher, origin: WeightOrigin) -> None:
    """Copy initial weights into a task model. ValueError unless every tensor of both is accounted for and fits."""
    ours, theirs = model.state_dict(), blip.state_dict()
    named = set(origin.copied) | set(origin.fresh)
    _refuse("the task model has", set(ours) ^ named | set(origin.copied) & set(origin.fresh))
    # A captioner or a matcher lacks some of the unused weights.
    unused = set(origin.unused) if isinstance(blip, Blip) else set(origin.unused) & set(theirs)
    _refuse("the pre-trained model has", set(theirs) ^ (set(origin.copied.values()) | unused))
    for name, source in origin.copied.items():
        if ours[name].shape != theirs[source].shape:
            raise ValueError(f"{name} is {list(ours[name].shape)}, {source} is {list(theirs[source].shape)}")
    model.load_state_dict({name: theirs[source] for name, source in origin.copied.items()}, strict=False)


def _refuse(where: str, names: set[str]) -> None:
    if names:
        some = sorted(names)
        raise ValueError(
            f"{where} {', '.join(some[:3])}{', ...' * (len(some) > 3)} that must be accounted for exactly once"
        )


def under(prefix: str, state: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """Names of a part's tensors under `prefix` -> the same under `source`: entries for `WeightOrigin.copied`."""
    return {f"{prefix}.{name}": f"{source}.{name}" for name in state}


def linear(*names: str) -> list[str]:
    """Names of the weights and biases of linear layers."""
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def not_contrasted() -> dict[str, str]:
    """Weights in `Blip` that only contrast uses: entries for `WeightOrigin.unused`."""
    return dict.fromkeys(["temperature", *linear("image_proj", "text_proj")], "nothing is contrasted")


def not_generated(layers: int) -> dict[str, str]:
    """Weights in `Blip` that only generation uses, causal self-attentions and the vocabulary's head: likewise."""
    own = ("causal.qkv", "causal.out", "causal_norm")
    parts = [f"med.blocks.{i}.{name}" for i in range(layers) for name in own] + ["med.head_dense", "med.head_norm"]
    return dict.fromkeys(["med.head_bias", *linear(*parts)], "nothing is generated")
