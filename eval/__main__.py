"""Evaluate a model, or score existing answers.

List the options of a task with, say, blip-eval captioning --help. To share the work: `torchrun ... -m eval TASK ...`.
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
from blip.checkpoints.naming import check_named
from eval.options import COMMANDS


def main(args: list[str] | None = None) -> int:
    """Run a command line, the process's own by default; wrong usage ends the process with status 2."""
    args = sys.argv[1:] if args is None else args
    return exit.run(lambda: _measure(args))


def _measure(args: list[str]) -> None:
    kinds = dict.fromkeys(kind for kind, _ in COMMANDS.values())
    examples = (inspect.getdoc(kind).replace("Examples:\n\n", "") for kind in kinds)
    name = options.verb("blip-eval", args, dict.fromkeys(COMMANDS, ""), "\n\n".join((__doc__.strip(), *examples)))
    if name is None:
        return
    chosen = read(name, args[1:])
    if chosen_model := getattr(chosen, "model", None):
        check_named(chosen_model)
    from eval.runner import measure  # imports torch: after help and typing errors

    measure(import_module(COMMANDS[name][1]).evaluate, chosen)


def read(name: str, args: list[str]) -> Any:
    """Read the options of one of COMMANDS; given `decode` options override the preset. One-line ValueError."""
    kind, _ = COMMANDS[name]
    under = functools.partial(_preset, kind) if hasattr(kind, "preset") else None
    return options.read(kind, args, f"blip-eval {name}", files=True, under=under)


def _preset(kind: type, given: options.Tree) -> options.Tree:
    from blip.inference.settings import DECODE_PRESETS

    return {"decode": dataclasses.asdict(DECODE_PRESETS[given.get("preset", kind.preset)])}


def command() -> NoReturn:
    """Entry point of the program `blip-eval`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
