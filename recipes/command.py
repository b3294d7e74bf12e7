"""How recipes read their command line: dataclasses from YAML and options, and one clear line when something is off."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import auto_cli, set_parsing_settings

from blip.app.exit import WRONG_USE, fail, one_line, run, unknown_option

__all__ = ["WRONG_USE", "fail", "read", "run"]

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # for --help

Settings = TypeVar("Settings")


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
        options = dict(_walk(settings))
        contents = {path: _content(path, _sections(settings)) for path in _config_files(args)}
        _check_names(args, {f"--{name}" for name in options} | {"--config", "--print_config", "--help"})
        _check_given(args, contents, options)
        args = _with_new_lists(args, contents, [f"--{name}" for name, kind in options.items() if _holds_sections(kind)])
        return auto_cli(settings, args=args, as_positional=False, exit_on_error=False, allow_abbrev=False)
    except Exception as error:
        fail(one_line(error), WRONG_USE)


def _check_given(args: list[str], contents: dict[str, dict], options: dict[str, type]) -> None:
    """Refuse `null` where there has to be a value: the parser takes it, and the run fails where nobody expects it."""
    values = {name: get_args(kind) for name, kind in options.items() if not dataclasses.is_dataclass(kind)}
    needed = [name for name, kinds in values.items() if not {None, type(None)} & set(kinds)]
    given = {option.removeprefix("--"): value for option, value in itertools.pairwise(args)}
    given |= dict(arg.removeprefix("--").split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
    for name in needed:
        where = [f"--config {path}: " for path, content in contents.items() if _at(content, name) is None]
        if where or given.get(name) == "null":
            raise ValueError(f"{(where or ['--'])[0]}{name} is null; give a value, or leave it out for the default")


def _walk(settings: type, before: str = "") -> Iterator[tuple[str, type]]:
    """Names and types of the options that a settings class has, sections, lists and what is in them included."""
    for name, kind in get_type_hints(settings).items():
        yield before + name, kind
        for inner in (kind, *get_args(kind)):
            if dataclasses.is_dataclass(inner):
                yield from _walk(inner, f"{before}{name}.")


def _at(content: object, name: str) -> object:
    """What a mapping of mappings has under a.b.c; the name itself if nothing."""
    for key in name.split("."):
        if not isinstance(content, dict) or key not in content:
            return name
        content = content[key]
    return content


def _holds_sections(kind: type) -> bool:
    """Whether an option is a list of settings."""
    return get_origin(kind) is list and any(map(dataclasses.is_dataclass, get_args(kind)))


def _with_new_lists(args: list[str], contents: dict[str, dict], lists: list[str]) -> list[str]:
    """Empty each list of settings before it is given anew.

    Two lists of one length would be merged item by item otherwise, so that a source got another's split and weight.
    """
    fresh: list[str] = []
    for option, value in itertools.zip_longest(args, args[1:]):
        name, _, inline = option.partition("=")
        if name == "--config":
            given = contents.get(inline or value, {})
            fresh += [f"{one}=[]" for one in lists if (key := one.removeprefix("--")) != _at(given, key)]
        elif name in lists:
            fresh.append(f"{name}=[]")
        fresh.append(option)
    return fresh


def _check_names(args: list[str], options: set[str]) -> None:
    for arg in args:
        name = arg.partition("=")[0].removesuffix("+")  # --list+=item appends
        if name.startswith("--") and name not in options:
            raise ValueError(unknown_option(name, options))


def _config_files(args: list[str]) -> list[str]:
    following = [value for option, value in itertools.pairwise(args) if option == "--config"]
    return following + [arg.split("=", 1)[1] for arg in args if arg.startswith("--config=")]


def _sections(settings: type) -> set[str]:
    """Options that are groups of options and cannot be left empty."""
    return {name for name, kind in get_type_hints(settings).items() if dataclasses.is_dataclass(kind)}


def _content(path: str, sections: set[str]) -> dict:
    """What a file of options says, looked over."""
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
    return content
