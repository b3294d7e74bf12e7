"""The `blip` command: each sub-command is a file in blip/app/commands with a dataclass of its options and a `run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from blip import options
from blip.app import exit
from blip.app.commands.shared import MODEL_VARIABLE, ModelOptions
from blip.checkpoints.naming import check_named
from blip.errors import Stopped

COMMANDS = {
    "caption": "caption images",
    "review": "edit captions beside images in the browser",
    "match": "score how well texts match images",
    "search": "find images by text or by an image",
    "duplicates": "find copies among the images of a folder",
    "embed": "write embeddings of images as files",
    "classify": "classify images by class names",
    "explain": "show which image regions match a text",
    "vqa": "answer a question about images",
    "convert": "import or export weights",
    "demo": "try the model in a browser",
    "serve": "serve a model over HTTP",
    "doctor": "check this machine",
}
"""Modules of blip.app.commands, and the purpose of each. Importing one does not import torch."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, the process's own by default; returns or exits with its status."""
    args = sys.argv[1:] if args is None else args
    about = "BLIP: images and text."
    carry_out = partial(options.carry_out, "blip", args, COMMANDS, "blip.app.commands", about, check_model)
    return exit.run(carry_out, also=Stopped)


def check_model(chosen: Any) -> None:
    """Raise FileNotFoundError for a model that cannot exist, before torch is imported."""
    if isinstance(chosen, ModelOptions) and (where := chosen.model or os.environ.get(MODEL_VARIABLE)):
        check_named(where)


def command() -> NoReturn:
    """Entry point of the program `blip`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
