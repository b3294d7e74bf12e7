"""Task models: the parts of BLIP put together otherwise (paper, section 5), and how a model directory names them."""

from __future__ import annotations

from typing import Any, NamedTuple

from blip.models.blip import Blip, Captioner, Matcher
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
PARTS: dict[str, type[Any]] = {"all": Blip, "writing": Captioner, "matching": Matcher}
"""What config.json of a "blip" says as `parts` -> the class that is built instead."""


def kind_of(task: str, config: BlipConfig) -> type[Any]:
    """The class of a model by what its config.json says."""
    return PARTS[config.parts] if task == "blip" else TASKS[task].model


def names_of(kind: type[Any]) -> tuple[str, str]:
    """What config.json says of a class, as `task` and as `parts`."""
    for parts, model in PARTS.items():
        if model is kind:
            return "blip", parts
    return next(name for name, task in TASKS.items() if task.model is kind), "all"
