"""Model configurations, as stored in config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from blip.nn.settings import TextConfig, TrainingOptions, VisionConfig
from blip.settings import LATER, WIDTH, between, check_fields, known


@dataclass(frozen=True)
class BlipConfig:
    """Configuration of a `Blip` or of its parts."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = field(default=256, metadata=WIDTH)
    """Width of the joint embedding of images and texts."""
    temperature: float = field(default=0.07, metadata=between(1e-4, 100))
    """Initial value of the learned temperature of the contrastive softmax."""
    parts: Literal["all", "writing", "matching"] = field(default="all", metadata=LATER)
    """Parts of the model, by a key of `blip.models.families.PARTS`: a whole `Blip`, a `Captioner` or a `Matcher`."""

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlipConfig:
        """Build from `to_dict`'s output, this or an earlier version's; ValueError names an unknown or missing key."""
        values = known(cls, values, "model config")
        for part, kind in (("vision", VisionConfig), ("text", TextConfig)):
            values[part] = kind(**known(kind, values[part], f"{part} config", former=_FORMER[part]))
        return cls(**values)


_FORMER = {"vision": ("drop_path", "patch_drop", "checkpoint"), "text": ("dropout", "attention_dropout")}
"""Training options that older versions saved with the shapes."""


def former_options(values: dict[str, Any]) -> TrainingOptions | None:
    """Read the training options from the `to_dict` output of an older version; None if it has none."""
    options: dict[str, Any] = {}
    for part, names in _FORMER.items():
        stored = {name: values[part][name] for name in names if name in values[part]}
        try:
            TrainingOptions(**stored)
        except ValueError as error:
            raise ValueError(f"{part}.{error}") from None
        options |= stored
    return TrainingOptions(**options) if options else None


@dataclass(frozen=True)
class NlvrModelConfig(BlipConfig):
    """Configuration of a model that reasons over several images (paper, section 5.4)."""

    images: int = field(default=2, metadata=between(2, 64))
    """Number of images of an example."""

    @classmethod
    def of(cls, config: BlipConfig, images: int) -> NlvrModelConfig:
        """Take the sizes of a pre-trained model, for examples of `images` images."""
        return cls(config.vision, config.text, config.embed_dim, config.temperature, images=images)


@dataclass(frozen=True)
class DialogueModelConfig(BlipConfig):
    """Configuration of a model that ranks answers in a dialogue about an image (paper, section 5.5)."""

    caption_sees_image: bool = False
    """Encode the caption over the image instead of alone."""

    @classmethod
    def of(cls, config: BlipConfig, caption_sees_image: bool) -> DialogueModelConfig:
        """Take the sizes of a pre-trained model."""
        sees = caption_sees_image
        return cls(config.vision, config.text, config.embed_dim, config.temperature, caption_sees_image=sees)
