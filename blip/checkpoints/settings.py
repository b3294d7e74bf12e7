"""Settings in the configuration beside foreign weights that shapes do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blip.models.presets import BASE, usual_options
from blip.nn.settings import TrainingOptions


@dataclass(frozen=True)
class Settings:
    """Settings that shapes do not show; None if not stated."""

    vision_heads: int | None = None
    text_heads: int | None = None
    vision_eps: float | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TextConfig`."""
    options: TrainingOptions = field(default_factory=lambda: usual_options(BASE.text))
    """Training options; the paper's where nothing states them."""
    ids: Mapping[str, int] = field(default_factory=dict)
    """Special ids in the configuration, which the tokenizer must have."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Fields of transformers' configuration that must agree with the shapes."""
