"""How recipes read their command line: dataclasses from YAML and options, and one clear line when something is off."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_type_hints

import yaml
from jsonargparse import auto_cli, set_parsing_settings

from blip.data.errors import DataError

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # for --help

Settings = TypeVar("Settings")
WRONG_USE = 2
"""Exit status for options or files that do not fit."""


class _OneKeyLoader(yaml.SafeLoader):
    """Refuses a mapping that names a key twice; YAML itself silently takes the last."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "an option's name must be a word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_OneKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(settings: type[Settings], args: list[str] | None = None) -> Settings:
    """Build `settings` from `--config FILE.yaml` and `--any.option value`; what is off ends the process with status 2.

    `--help` lists every option with its meaning, `--print_config` prints the effective YAML.
    """
    args = sys.argv[1:] if args is None else args
    try:
        for path in _config_files(args):
            _check_file(path, _sections(settings))
        return auto_cli(settings, args=args, as_positional=False, exit_on_error=False)
    except Exception as error:
        fail(_one_line(error), WRONG_USE)


def run(main: Callable[[], None]) -> None:
    """Run a recipe; what a person can put right is said in a line, not in a traceback."""
    try:
        main()
    except (DataError, ValueError, OSError) as error:
        fail(_one_line(error), WRONG_USE)


def fail(message: str, status: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(status)


def _config_files(args: list[str]) -> list[str]:
    following = [value for option, value in itertools.pairwise(args) if option == "--config"]
    return following + [arg.split("=", 1)[1] for arg in args if arg.startswith("--config=")]


def _sections(settings: type) -> set[str]:
    """Options that are groups of options and cannot be left empty."""
    return {name for name, kind in get_type_hints(settings).items() if dataclasses.is_dataclass(kind)}


def _check_file(path: str, sections: set[str]) -> None:
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _OneKeyLoader)
    except RecursionError:
        raise ValueError(f"--config {path}: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config {path}{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected a mapping of options, got {type(content).__name__}")
    for name in sections & content.keys():
        if not isinstance(content[name], dict | str):
            raise ValueError(f"--config {path}: {name} must be a mapping of options, got {content[name]!r}")


def _one_line(error: Exception) -> str:
    return re.sub(r":?\s*\n\s*", ": ", str(error).strip()) or type(error).__name__
