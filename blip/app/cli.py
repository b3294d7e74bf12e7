"""The `blip` command: each sub-command is a file in blip/app/commands with a dataclass of its options and a `run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from blip import options
from blip.app import exit
from blip.errors import Stopped

COMMANDS = {
    "caption": "say what images show",
    "match": "say how well texts fit images",
    "search": "find images by a text",
    "classify": "choose among classes by their names",
    "explain": "show where a text is found in an image",
    "vqa": "answer a question about images",
    "convert": "bring weights in or take them out",
    "demo": "try the model out in a browser",
    "doctor": "look at what this machine has",
}
"""Modules of blip.app.commands with what each is for. Importing one imports no torch."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, or the process's own; returns or exits with its status."""
    args = sys.argv[1:] if args is None else args
    about = "BLIP: images and words."
    return exit.run(lambda: options.carry_out("blip", args, COMMANDS, "blip.app.commands", about), also=Stopped)


def command() -> NoReturn:
    """The program `blip`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
