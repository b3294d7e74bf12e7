"""Measure what a model can do, or score answers that are there.

Each task lists its options: blip-eval captioning --help. `torchrun ... -m eval captioning ...` shares the work.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn, get_args, get_type_hints

from blip.app.exit import WRONG_USE, fail, leave, one_line, run, unknown_option
from eval.options import COMMANDS

_STOPPED = 130
"""What a shell reports of a program that SIGINT ended."""


def main(args: list[str] | None = None) -> None:
    """Carry out a command line, or the process's own; what does not fit ends the process with status 2."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in ("-h", "--help"):
        kinds = dict.fromkeys(kind for kind, _ in COMMANDS.values())
        print(__doc__.strip(), *(inspect.getdoc(kind).replace("Examples:\n\n", "") for kind in kinds), sep="\n\n")
        return
    if not args or args[0] not in COMMANDS:
        said = f"there is no {args[0]!r}" if args else "nothing is asked for"
        fail(f"{said}; give one of {', '.join(COMMANDS)} (blip-eval --help explains)", WRONG_USE)
    options = read(args[0], args[1:])
    try:
        run(lambda: _carry_out(args[0], options))
    except KeyboardInterrupt:
        raise SystemExit(_STOPPED) from None


def _carry_out(name: str, options: Any) -> None:
    from eval.runner import measure  # with torch, for which the help and a typing error need not wait

    measure(import_module(COMMANDS[name][1]).evaluate, options)


def read(name: str, args: list[str]) -> Any:
    """The options of one of COMMANDS; what is off ends the process with status 2."""
    from jsonargparse import auto_cli, set_parsing_settings  # here, so that --help is quick

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    kind, _ = COMMANDS[name]
    ways = {"prog": f"blip-eval {name}", "as_positional": False, "exit_on_error": False, "allow_abbrev": False}
    try:
        preset, defaults = _preset(kind, args)
        options = auto_cli(kind, args=args, set_defaults=defaults, **ways)
        if preset != getattr(options, "preset", None):
            raise ValueError("preset: give it as --preset NAME, not in the file of --config")
        return options
    except Exception as error:
        said = one_line(error)
        unknown = re.match(r"unrecognized arguments: (-\S+)", said)
        fail(unknown_option(unknown[1], _names(kind)) if unknown else _short(said), WRONG_USE)


def _preset(kind: type, args: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The preset that is asked for, and what it makes of the `--decode.` options that are not given."""
    from blip.inference.settings import DECODE_PRESETS

    if not hasattr(kind, "preset"):
        return None, {}
    given = [after for option, after in itertools.pairwise(args) if option == "--preset"]
    given += [arg.split("=", 1)[1] for arg in args if arg.startswith("--preset=")]
    preset = given[-1] if given else kind.preset
    values = dataclasses.asdict(DECODE_PRESETS[preset]) if preset in DECODE_PRESETS else {}
    return preset, {f"decode.{name}": value for name, value in values.items()}


def _names(kind: type, before: str = "--") -> Iterator[str]:
    """All options of a class, those of the classes in it too."""
    for name, inner in get_type_hints(kind).items():
        yield before + name
        for part in (inner, *get_args(inner)):
            if dataclasses.is_dataclass(part):
                yield from _names(part, f"{before}{name}.")


def _short(said: str) -> str:
    """Without the types that jsonargparse tried in vain."""
    found = re.match(r'Parser key "([^"]+)".*?Problem with given class_path \S+: (.*?): - Expected', said)
    return f"--{found[1]}: {found[2]}" if found else said


def command() -> NoReturn:
    """The program `blip-eval`."""
    leave(main)


if __name__ == "__main__":
    command()
