"""Table of all models: BLIP, its parts and its task models (paper, section 5), by their names in config.json."""

from __future__ import annotations

from typing import Any, NamedTuple

from blip.models.blip import Blip, Captioner, Matcher
from blip.models.dialogue import Dialogue
from blip.models.nlvr import Nlvr
from blip.models.settings import BlipConfig, DialogueModelConfig, NlvrModelConfig
from blip.models.vqa import Vqa


class Task(NamedTuple):
    """A kind of model that a model directory may hold."""

    model: type[Any]
    """Class of the model, built from its configuration; has `config`, `vision` and, except for `Blip`, `from_blip`."""
    used_by: str
    """Commands or tasks that use such a model, for messages."""
    tags: tuple[str, ...]
    """Tags of the model on the hub."""
    config: type[BlipConfig] = BlipConfig
    """Class of the model's configuration."""


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
"""Values of `task` in config.json ("blip" if absent) -> the kind of model."""
PARTS: dict[str, type[Any]] = {"all": Blip, "writing": Captioner, "matching": Matcher}
"""Values of `parts` in the config.json of a "blip" -> the class of the model."""


def kind_of(task: str, config: BlipConfig) -> type[Any]:
    """Look up the class of a model by its config.json."""
    return PARTS[config.parts] if task == "blip" else TASKS[task].model


def names_of(kind: type[Any]) -> tuple[str, str]:
    """Look up the values of `task` and `parts` in config.json for a class."""
    for parts, model in PARTS.items():
        if model is kind:
            return "blip", parts
    return next(name for name, task in TASKS.items() if task.model is kind), "all"
