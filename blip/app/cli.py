"""The `blip` command: each sub-command is a file in blip/app/commands with a dataclass of its options and a `run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from blip import options
from blip.app import exit
from blip.errors import Stopped

COMMANDS = {
    "caption": "caption images",
    "match": "score how well texts match images",
    "search": "find images by text",
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
    return exit.run(lambda: options.carry_out("blip", args, COMMANDS, "blip.app.commands", about), also=Stopped)


def command() -> NoReturn:
    """Entry point of the program `blip`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
