"""Task models: the parts of BLIP put together otherwise (paper, section 5), and how a model directory names them."""

from __future__ import annotations

from typing import Any, NamedTuple

from blip.models.blip import Blip
from blip.models.dialogue import Dialogue
from blip.models.nlvr import Nlvr
from blip.models.settings import BlipConfig, DialogueModelConfig, NlvrModelConfig
from blip.models.vqa import Vqa


class Task(NamedTuple):
    """What a model directory may hold."""

    model: type[Any]
    """Built from its configuration alone; has `config` and `vision`, and `from_blip` unless it is `Blip` itself."""
    used_by: str
    """What such a model is for, for people."""
    tags: tuple[str, ...]
    """How the hub sorts it."""
    config: type[BlipConfig] = BlipConfig
    """Of the model."""


TASKS: dict[str, Task] = {
    "blip": Task(Blip, "captioning and matching", ("image-to-text", "image-text-matching")),
    "nlvr": Task(
        Nlvr,
        "`blip-eval nlvr2` and `blip-eval nlvr`",
        ("visual-question-answering", "image-text-matching"),
        NlvrModelConfig,
    ),
    "dialogue": Task(
        Dialogue, "`recipes.dialogue` and `blip-eval visdial`", ("visual-question-answering",), DialogueModelConfig
    ),
    "vqa": Task(Vqa, "`blip vqa` and `blip-eval vqa`", ("visual-question-answering",)),
}
"""What config.json says as `task` (nothing for "blip") -> the class that is built."""
