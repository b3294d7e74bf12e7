"""The `blip` command: each sub-command is a file in blip/commands that adds its options and has a `run`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from blip.app.commands import caption, classify, convert, demo, doctor, explain, match, search, vqa
from blip.app.exit import WRONG_USE, fail, leave, one_line, unknown_option
from blip.errors import DataError, Stopped

COMMANDS = (caption, match, search, classify, explain, vqa, convert, demo, doctor)
"""Each has `add(subparsers)`, which sets `run(namespace) -> exit status`. Importing them imports no torch."""
_STOPPED, _PIPE_CLOSED = 130, 141
"""What a shell reports of a program that SIGINT or SIGPIPE ended."""


class Parser(argparse.ArgumentParser):
    """Takes whole options only, and says in one line what is off."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        fail(f"{message} ({self.prog} --help explains)", WRONG_USE)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, or the process's own; returns or exits with its status."""
    parser = Parser(prog="blip", description="BLIP: pictures and words.", epilog="blip COMMAND --help shows examples.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    chosen, unknown = parser.parse_known_args(args)
    if unknown:
        asked = commands.choices[chosen.command]
        asked.error(unknown_option(unknown[0], re.findall(r"--[a-z-]+", asked.format_usage())))
    if sys.stdout is None:  # what is opened next would get its number, and answers would go there
        fail("standard output is closed; let it go to /dev/null", WRONG_USE)
    try:
        return chosen.run(chosen)
    except KeyboardInterrupt:
        return _STOPPED
    except BrokenPipeError:  # the reader, `head` say, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except (DataError, ValueError, OSError, Stopped) as error:
        fail(one_line(error), WRONG_USE)


def command() -> NoReturn:
    """The program `blip`."""
    leave(main)


if __name__ == "__main__":
    command()
