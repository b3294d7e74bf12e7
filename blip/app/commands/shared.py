"""Options that sub-commands share. Light to import, as all is that `blip --help` needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip.options import argument, option

MODEL_VARIABLE = "OPENBLIP_MODEL"
"""Environment variable with the model that is used where no --model is given."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOption:
    """Vocabulary."""

    tokenizer: str | None = option(None, metavar="PATH")
    """Vocabulary for a model that brings none, as a .pth: vocab.txt, tokenizer.json, folder or name on the hub
    (default: what is beside the file, $OPENBLIP_TOKENIZER, or bert-base-uncased)"""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TokenizerOption):
    """Model: which one, where and how exactly it computes."""

    model: str | None = option(None, metavar="DIR")
    """Model folder, released .pth, or name on the hub (default: $OPENBLIP_MODEL)"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one, else cpu"""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numeric precision; `auto` is float32, where answers do not depend on --batch; bfloat16 is faster and rounds
    differently for every batch size"""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Answers: how and where they go."""

    json: bool = False
    """Answer in JSON lines"""
    out: str | None = option(None, metavar="FILE")
    """Answer into a file, or continue it (default: standard output)"""
    batch: int = option(16, metavar="N")
    """Images that go through the model at once"""

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(AnswerOptions):
    """Answers: how and where they go."""

    images: list[str] = argument("IMAGE")
    """Image, folder of images (with its folders, linked ones too) or quoted glob"""


def at_least(least: int, **values: int | None) -> None:
    """Raise ValueError naming the first given value below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
