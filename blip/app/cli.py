"""The `blip` command: each sub-command is a file in blip/app/commands that has its `Options` and a `run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from blip.app import exit, options
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
"""Modules of blip.app.commands with what each is for. One has `Options`, `EXAMPLE` and `run(options) -> exit status`;
importing it imports no torch."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, or the process's own; returns or exits with its status."""
    args = sys.argv[1:] if args is None else args
    return exit.run(lambda: _carry_out(args), also=Stopped)


def _carry_out(args: Sequence[str]) -> int:
    name = options.verb("blip", args, COMMANDS, "BLIP: images and words.")
    if name is None:
        return 0
    command = import_module(f"blip.app.commands.{name}")
    chosen = options.read(command.Options, args[1:], f"blip {name}", examples=command.EXAMPLE)
    if sys.stdout is None:  # what is opened next would get its number, and answers would go there
        raise ValueError("standard output is closed; let it go to /dev/null")
    return command.run(chosen)


def command() -> NoReturn:
    """The program `blip`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
