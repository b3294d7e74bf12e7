"""Options that sub-commands share. Light to import, so that `blip --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip.options import argument, option

MODEL_VARIABLE = "OPENBLIP_MODEL"
"""Environment variable with the default of --model."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOption:
    """Vocabulary."""

    tokenizer: str | None = option(None, metavar="PATH")
    """Vocabulary for a model without one, such as a .pth: vocab.txt, tokenizer.json, folder or name on the hub
    (default: a vocabulary beside the file, else $OPENBLIP_TOKENIZER, else bert-base-uncased)"""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TokenizerOption):
    """Model, device and precision."""

    model: str | None = option(None, metavar="DIR")
    """Model folder, released .pth, or name on the hub, ORG/NAME or ORG/NAME@REVISION (default: $OPENBLIP_MODEL)"""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1 or mps; `auto` is a GPU if there is one, else cpu"""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numeric precision; `auto` is float32, where answers do not depend on --batch; bfloat16 is faster and rounds
    differently for every batch size"""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Output of answers."""

    json: bool = False
    """Print JSON lines"""
    out: str | None = option(None, metavar="FILE")
    """Write answers to this file, continuing an unfinished one (default: standard output)"""
    batch: int = option(16, metavar="N")
    """Number of images per batch"""

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(AnswerOptions):
    """Images, and output of answers."""

    images: list[str] = argument("IMAGE")
    """Image, folder of images (including subfolders and linked folders) or quoted glob"""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Index of a folder."""

    index: str | None = option(None, metavar="DIR")
    """Folder of the index (default: FOLDER/.blip-index, or the user's cache for a read-only folder)"""
    rebuild: bool = False
    """Discard the index and embed all images again"""


def at_least(least: int, **values: int | None) -> None:
    """Raise ValueError naming the first given value below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
