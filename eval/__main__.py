"""Measure what a model can do, or score answers that are there.

Each task lists its options: blip-eval captioning --help. `torchrun ... -m eval captioning ...` shares the work.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from importlib import import_module
from typing import Any, NoReturn

from blip import options
from blip.app import exit
from eval.options import COMMANDS


def main(args: list[str] | None = None) -> int:
    """Carry out a command line, or the process's own; what does not fit ends the process with status 2."""
    args = sys.argv[1:] if args is None else args
    return exit.run(lambda: _measure(args))


def _measure(args: list[str]) -> None:
    kinds = dict.fromkeys(kind for kind, _ in COMMANDS.values())
    examples = (inspect.getdoc(kind).replace("Examples:\n\n", "") for kind in kinds)
    name = options.verb("blip-eval", args, dict.fromkeys(COMMANDS, ""), "\n\n".join((__doc__.strip(), *examples)))
    if name is None:
        return
    chosen = read(name, args[1:])
    from eval.runner import measure  # with torch, for which the help and a typing error need not wait

    measure(import_module(COMMANDS[name][1]).evaluate, chosen)


def read(name: str, args: list[str]) -> Any:
    """The options of one of COMMANDS; a preset lies under the `decode` options that are given. ValueError in a line."""
    kind, _ = COMMANDS[name]
    under = functools.partial(_preset, kind) if hasattr(kind, "preset") else None
    return options.read(kind, args, f"blip-eval {name}", files=True, under=under)


def _preset(kind: type, given: options.Tree) -> options.Tree:
    from blip.inference.settings import DECODE_PRESETS

    return {"decode": dataclasses.asdict(DECODE_PRESETS[given.get("preset", kind.preset)])}


def command() -> NoReturn:
    """The program `blip-eval`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
