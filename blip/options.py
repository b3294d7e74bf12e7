"""Options of all programs: a dataclass whose field docstrings are the help, filled from YAML and the command line.

    options = read(Caption, ["photo.jpg", "--num", "3"], "blip caption")

Names have dashes on the command line (underscores are accepted) and underscores in YAML and Python. Options of a
section are `--section.name`. Each value is checked against its field's type.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import re
import reprlib
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

T = TypeVar("T")
Tree = dict[str, Any]
"""Given values by name; a section is a nested tree."""
LAST = -1
"""Marker in a path for the last item of a list of sections."""
PROJECT = "openblip"


def version() -> str:
    """Version of this project as installed, or as stated in the checkout that this file belongs to."""
    from importlib import metadata  # here and below, as few need it

    try:
        return metadata.version(PROJECT)
    except metadata.PackageNotFoundError:
        settings = Path(__file__).parents[1] / "pyproject.toml"
    try:
        import tomllib

        project = tomllib.loads(settings.read_text(encoding="utf-8"))["project"]
        return f"{project['version']}+checkout" if project["name"] == PROJECT else "unknown"
    except (OSError, ValueError, KeyError):
        return "unknown"


# Declaring ------------------------------------------------------------------------------------------------------------


def option(default: Any = dataclasses.MISSING, *, metavar: str = "", was: str = "", repeat: bool = False) -> Any:
    """Declare a field as an option, with the placeholder of its value in the help and the option's former name.

    With `repeat` each occurrence of the option adds an item to a list; an item that is a tuple takes that many values.
    """
    how = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**how, metadata={"metavar": metavar, "was": was, "repeat": repeat})


def argument(metavar: str, *, least: int = 1) -> Any:
    """Declare a field as a positional argument; a list takes `least` or more."""
    how = {} if least else {"default_factory": list}
    return dataclasses.field(**how, metadata={"argument": metavar, "least": least})


def flat(*, part: type | None = None, skip: Sequence[str] = ()) -> Any:
    """Declare a section whose options have no prefix; fields to `skip` are not options.

    With `part` the field is a mapping of the given fields of the class `part`.
    """
    return dataclasses.field(metadata={"flat": True, "part": part, "skip": skip})


class Option(NamedTuple):
    """A field of a dataclass as an option."""

    name: str
    """Name on the command line, without `--`."""
    path: tuple[str | int, ...]
    """Keys that lead to the value in a tree of options."""
    kind: Any
    """Type of the value, without None."""
    may_be_none: bool
    field: dataclasses.Field
    owner: type
    """Class that declares the field."""
    section: tuple[type, str, str] | None
    """Field that declares its section, by class and name, and the prefix of that field's docstring."""
    default: Any
    required: bool


def walk(kind: type, before: Option | None = None, under: Any = None) -> Iterator[Option]:
    """Yield all options of a dataclass, a section before its fields; `under` overrides the class's defaults."""
    prefix, path, section, required = "", (), None, True
    if before:
        title = f"each of {before.name}: " if _item(before.kind) else f"{before.name}: "
        prefix, path, section = f"{before.name}.", before.path, (before.owner, before.field.name, title)
        path, required = (*path, LAST) if _item(before.kind) else path, before.required and not _item(before.kind)
    for field, inner, may_be_none in _fields(kind).values():
        owner = next(one for one in kind.__mro__ if field.name in inspect.get_annotations(one))
        default = _default(field) if under is None else getattr(under, field.name)
        if field.metadata.get("flat"):
            for one in walk(field.metadata["part"] or inner):
                if one.path[0] not in field.metadata["skip"]:
                    yield one._replace(path=(field.name, *one.path), section=one.section or (owner, field.name, ""))
            continue
        name, needed = prefix + field.name.replace("_", "-"), required and default is dataclasses.MISSING
        one = Option(name, (*path, field.name), inner, may_be_none, field, owner, section, default, needed)
        yield one
        if dataclasses.is_dataclass(inner):
            yield from walk(inner, one, default if isinstance(default, inner) else None)
        elif item := _item(inner):
            yield from walk(item, one)


@functools.cache
def _fields(kind: type) -> dict[str, tuple[dataclasses.Field, Any, bool]]:
    """Each field with its type and whether it may be None."""
    hints = typing.get_type_hints(kind)
    return {field.name: (field, *_plain(hints[field.name])) for field in dataclasses.fields(kind)}


def _plain(hint: Any) -> tuple[Any, bool]:
    """Split `int | None` into `int` and whether it may be None."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    (inner,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    return inner, True


def _item(kind: Any) -> type | None:
    """The class of the items of a list of sections."""
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    return inner if dataclasses.is_dataclass(inner) else None


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# Reading --------------------------------------------------------------------------------------------------------------


def read(
    kind: type[T],
    args: Sequence[str],
    program: str,
    *,
    examples: str = "",
    files: bool = False,
    under: Callable[[Tree], Tree] | None = None,
) -> T:
    """Build the dataclass from a command line; one-line ValueError for wrong options.

    `--help` prints all options and ends the process. With `files`, options may be given in YAML by `--config FILE`, any
    number of times, later values winning; `--print-config` prints all settings and ends the process. `under` maps the
    given options to values that replace the class's defaults, such as a preset's.
    """
    options, tree, prints = {one.name: one for one in walk(kind)}, {}, False
    words = _spelled(args, {_PRINT, *(one.name for one in options.values() if one.kind is bool)})
    explains = any(word in ("-h", "--help") for word in words)
    if "--version" in words and "version" not in options:
        print(PROJECT, version())
        raise SystemExit(0)
    parser = _parser(kind, options.values(), program, examples, files, explains)
    given, unknown = parser.parse_known_args(words, argparse.Namespace(values=[]))
    if unknown:
        parser.error(_unknown(unknown[0], options, ("help", "config", _PRINT) if files else ("help",)))
    for name, value in given.values:
        if name == "config":
            tree = laid_over(tree, from_file(kind, value))
        elif name == _PRINT:
            prints = True
        else:
            _put(tree, options[name.removesuffix("+")], value, name.endswith("+"))
    made = build(kind, laid_over(under(tree), tree) if under else tree)
    if prints:
        import yaml

        print(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(made))), sort_keys=False), end="")
        raise SystemExit(0)
    return made


_PRINT = "print-config"
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def _spelled(args: Sequence[str], flags: set[str]) -> list[str]:
    """Normalize names to dashes; a flag takes the next word if that is true or false, else means true.

    `--no-FLAG` is `--FLAG false`.
    """
    done: list[str] = []
    for word, after in itertools.zip_longest(args, args[1:], fillvalue=""):
        if word == "--":
            return [*done, *args[len(done) :]]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            word = name + equals + value
            if word.startswith("--no-") and word[2:] not in flags and word[5:] in flags:
                word = f"--{word[5:]}=false"
            elif name[2:] in flags and not equals and after.lower() not in _WORDS:
                word += "=true"
        done.append(word)
    return done


def _unknown(word: str, options: Mapping[str, Option], more: Iterable[str]) -> str:
    if not word.startswith("--"):
        return f"unexpected argument {word!r}"
    former = {one.field.metadata.get("was"): name for name, one in options.items()}
    if (name := word[2:].partition("=")[0]) in former:
        return f"--{name} is now called --{former[name]}"
    return unknown_option(word, [f"--{name}" for name in (*options, *more)])


def unknown_option(option: str, options: Iterable[str]) -> str:
    """Message for an unknown option; abbreviations are not accepted, but the closest option is named."""
    option, options = option.partition("=")[0], sorted(options, key=len)
    closest = [name for name in options if name.startswith(option)] or difflib.get_close_matches(option, options, n=1)
    remedy = f"did you mean {closest[0]}?" if closest else "--help lists them all"
    return f"there is no option {option}; {remedy}"


def _put(tree: Tree, one: Option, value: Any, is_more: bool) -> None:
    """Set an option in a tree to its value on the command line, or append that to its list."""
    if one.field.metadata.get("repeat"):
        value, is_more = [tuple(value) if isinstance(value, list) else value], True
    elif "argument" not in one.field.metadata:
        value = _typed(one.kind, one.may_be_none, value, Place("--", one.name), is_text=True)
    inside: Any = tree
    for key, after in itertools.pairwise(one.path):
        if key != LAST and not inside.get(key):
            inside[key] = [{}] if after == LAST else {}
        inside = inside[key]
    key = one.path[-1]
    inside[key] = [*(inside.get(key) or []), *value] if is_more else value


def laid_over(under: Tree, over: Tree) -> Tree:
    """Merge two trees, values of `over` winning: sections are merged, lists are replaced."""
    both = [key for key in over if isinstance(over[key], dict) and isinstance(under.get(key), dict)]
    return {**under, **over, **{key: laid_over(under[key], over[key]) for key in both}}


def build(kind: type[T], given: Tree, before: str = "", under: Any = None) -> T:
    """Build the dataclass from given values; the others are as in `under`, or have their defaults.

    ValueError, naming the option, if one is missing or the class refuses it.
    """
    values: Tree = {}
    for name, (field, inner, _) in _fields(kind).items():
        value = given.get(name)
        default = _default(field) if under is None else getattr(under, name)
        if field.metadata.get("flat"):
            values[name] = value or {} if field.metadata["part"] else build(inner, value or {}, before)
        elif dataclasses.is_dataclass(inner) and (value is not None or default is dataclasses.MISSING):
            values[name] = build(
                inner, value or {}, f"{before}{name}.", default if isinstance(default, inner) else None
            )
        elif (item := _item(inner)) and value:
            values[name] = [build(item, one, f"{before}{name}.{i}.") for i, one in enumerate(value)]
        elif name in given:
            values[name] = value
        elif default is dataclasses.MISSING:
            raise ValueError(f"--{before}{name} is required")
    try:
        return kind(**values) if under is None else dataclasses.replace(under, **values)
    except ValueError as error:
        names_it = str(error).split(" ")[0] in _fields(kind)
        raise ValueError(f"{before}{error}" if names_it or not before else f"{before[:-1]}: {error}") from None


def written(chosen: Any) -> list[str]:
    """Return the command line from which `read` builds the same options, none of them sections or lists of words.

    Options at their defaults are left out, except given ones of a mapping.
    """
    arguments, words = [], []
    for one in walk(type(chosen)):
        value, is_given = chosen, False
        for key in one.path:
            is_given = isinstance(value, Mapping) and key in value
            value = value.get(key, one.default) if isinstance(value, Mapping) else getattr(value, str(key))
        if "argument" in one.field.metadata:
            arguments.append(value)
        elif one.field.metadata.get("repeat"):
            words += [f"--{one.name}={item}" for item in value]
        elif is_given or value != one.default:
            words.append(f"--{one.name}={'null' if value is None else value}")
    return [*arguments, *words]


# Values ---------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Place of a value, for messages."""

    where: str
    """`--`, or the name of a file."""
    path: str = ""

    def __str__(self) -> str:
        return self.where + self.path

    def inside(self, name: str | int) -> Place:
        return Place(self.where, f"{self.path}.{name}" if self.path else str(name))


def _typed(kind: Any, may_be_none: bool, value: Any, place: Place, is_text: bool) -> Any:
    """Convert a value from the command line or YAML to its field's type.

    ValueError, naming the place, if it does not fit.
    """
    if value is None or (is_text and value in ("null", ["null"]) and "null" not in typing.get_args(kind)):
        if not may_be_none:
            raise ValueError(f"{place} is null; give a value, or leave it out for the default")
        return None
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is None and not dataclasses.is_dataclass(kind):
        return _scalar(kind, value, place, is_text)
    if origin is Literal:
        choices = {str(one): one for one in reversed(inner)}
        if str(value) not in choices:
            _refuse(place, f"one of {', '.join(reversed(choices))}", value)
        return choices[str(value)]
    if is_text and (isinstance(value, str) or value[0].startswith("[")):  # YAML's short form
        value, is_text = _loaded(value if isinstance(value, str) else " ".join(value), str(place)), False
    if origin is None:
        return _section(kind, value, place)
    if not isinstance(value, list) or (origin is tuple and len(value) != len(inner)):
        _refuse(place, "a list" if origin is list else f"a list of {len(inner)} elements", value)
    kinds = inner if origin is tuple else inner * len(value)
    items = enumerate(zip(kinds, value, strict=True))
    return origin(_typed(*_plain(one), item, place.inside(i), is_text) for i, (one, item) in items)


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_NUMBERS = {int: r"[+-]?\d+", float: r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|\.?inf)"}


def _scalar(kind: type, value: Any, place: Place, is_text: bool) -> Any:
    if isinstance(value, str) and kind in _NUMBERS and (is_text or kind is float):  # to YAML, 1e-4 is text
        fits = re.fullmatch(_NUMBERS[kind], value, re.ASCII | re.IGNORECASE)
        value = kind(value.replace(".inf", "inf")) if fits else value
    elif kind is bool and is_text:
        value = _WORDS.get(value.lower(), value)
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not fits or value != value:  # not a number
        _refuse(place, _EXPECTED[kind], value)
    return kind(value)


def _section(kind: type, value: Any, place: Place) -> Tree:
    """Convert the given values of a section to their types."""
    if not isinstance(value, dict):
        _refuse(place, "a mapping of options", value)
    fields = _fields(kind)
    for key in [key for key in value if key not in fields]:
        names, given = {name: place.inside(name).path for name in fields}, place.inside(key).path
        former = {field.metadata.get("was"): names[name] for name, (field, *_) in fields.items()}
        if now := former.get(given.replace("_", "-")):
            raise ValueError(f"{place.where}{given} is now called {now}")
        raise ValueError(place.where.removesuffix("--") + unknown_option(given, names.values()))
    return {key: _typed(*fields[key][1:], item, place.inside(key), is_text=False) for key, item in value.items()}


def _refuse(place: Place, expected: str, value: Any) -> NoReturn:
    raise ValueError(f"{place}: expected {expected}, got {reprlib.repr(value)}")


# Files ----------------------------------------------------------------------------------------------------------------


def from_file(kind: type, path: str | Path) -> Tree:
    """Read a YAML file and its bases, converting values to their types; ValueError names the file and line."""
    trees = (_section(kind, content, place) for place, content in _with_bases(Path(path)))
    return functools.reduce(laid_over, trees, {})


def content(path: str | Path) -> Tree:
    """Read a YAML file and its bases, the outermost base first; names and types are not checked."""
    return functools.reduce(laid_over, (content for _, content in _with_bases(Path(path))), {})


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Place, Tree]]:
    """Yield the contents of a file and its bases, the outermost base first; a `base` is relative to its file."""
    called = f"--config {path}" if not above else f"--config {above[-1]}: base {path}"
    if not path.is_file():
        raise ValueError(f"{called}: no such file")
    try:
        options = _loaded(path.read_text(encoding="utf-8"), called, has_lines=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{called}: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{called}: expected a mapping of options, got {type(options).__name__}")
    place = Place(f"{called}: ")
    if "base" in options:
        base = _typed(str, False, options.pop("base"), place.inside("base"), is_text=False)
        if (path.parent / base).resolve() in (one.resolve() for one in (*above, path)):
            raise ValueError(f"{place}base {base} is itself based on this file; remove one of the two")
        yield from _with_bases(path.parent / base, (*above, path))
    yield place, options


def _loaded(text: str, called: str, has_lines: bool = False) -> Any:
    """Parse YAML; ValueError if the text is not YAML or has a duplicate key."""
    import yaml

    class _OneKeyLoader(yaml.SafeLoader):
        """Loader that refuses duplicate keys, of which YAML itself silently takes the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            seen: set[str] = set()
            for key, _ in node.value:
                problem = None if isinstance(key, yaml.ScalarNode) else "an option's name must be a word"
                if problem or key.value in seen:
                    problem = problem or f"duplicate key {key.value!r}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, _OneKeyLoader)
    except RecursionError:
        raise ValueError(f"{called}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and has_lines else ""
        raise ValueError(f"{called}{line}: {getattr(error, 'problem', None) or error}") from None


# Help -----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Parser that accepts whole names only, and reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Note(argparse.Action):
    """Record options in the order given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.values.append((self.dest, values))


class _Layout(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _parser(kind: type, options: Iterable[Option], program: str, examples: str, files: bool, explains: bool) -> _Parser:
    """Build a parser of command lines; with help texts only on request, as they are read from source code."""
    usage = " ".join([program, *(_place(one) for one in options if one.required), "[options]"])
    how = {"formatter_class": _Layout, "allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = _Parser(program, usage=usage, description=inspect.getdoc(kind), epilog=examples, **how)
    groups = {"": parser}
    if files:
        group = parser.add_argument_group("files")
        what = "YAML file of options; can be repeated, later options win"
        group.add_argument("--config", action=_Note, metavar="FILE", help=what)
        group.add_argument(f"--{_PRINT}", action=_Note, dest=_PRINT, metavar="", help="print all settings as YAML")
    for one in options:
        how = {"action": _Note, "help": _help(one) if explains else None}
        is_list = typing.get_origin(one.kind) in (list, tuple) and not one.field.metadata.get("repeat")
        if metavar := one.field.metadata.get("argument"):
            nargs = ("+" if one.field.metadata["least"] else "*") if is_list else None
            parser.add_argument(one.name, metavar=metavar, nargs=nargs, **how)
            continue
        title = _title(one, kind) if explains else ""
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        metavar, nargs = _metavar(one), "+" if is_list else None
        if one.field.metadata.get("repeat") and typing.get_origin(item := typing.get_args(one.kind)[0]) is tuple:
            metavar, nargs = tuple(metavar.split()), len(typing.get_args(item))
        group.add_argument(f"--{one.name}", dest=one.name, nargs=nargs, metavar=metavar, **how)
        if is_list:
            group.add_argument(f"--{one.name}+", dest=f"{one.name}+", nargs="+", **how | {"help": argparse.SUPPRESS})
    return parser


def _title(one: Option, kind: type) -> str:
    """Title of an option's group in the help: its section, or the class that declares it."""
    if dataclasses.is_dataclass(one.kind):
        return f"{one.name}: {docs(one.owner)[one.field.name]}"
    if one.section:
        owner, name, before = one.section
        return before + docs(owner)[name]
    return "" if one.owner is kind else inspect.getdoc(one.owner).split("\n")[0].rstrip(".")


def _help(one: Option) -> str:
    """Help text of an option, with its default."""
    if dataclasses.is_dataclass(one.kind):
        return "the whole section as inline YAML, or null for none" if one.may_be_none else argparse.SUPPRESS
    default, text = one.default, docs(one.owner)[one.field.name]
    if isinstance(default, bool):
        default = "true" if default else None
    elif isinstance(default, list | tuple):
        default = " ".join(map(str, default)) or None
    elif default == "" or (isinstance(default, str) and default != default.strip()):
        default = repr(default)
    if one.required and "argument" not in one.field.metadata:
        text += " (required)"
    elif default not in (None, dataclasses.MISSING):
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _place(one: Option) -> str:
    """Form of an option in the usage line."""
    if not (metavar := one.field.metadata.get("argument")):
        return f"--{one.name} {_metavar(one)}"
    if typing.get_origin(one.kind) is not list:
        return metavar
    return f"{metavar} [{metavar} ...]" if one.field.metadata["least"] else f"[{metavar} ...]"


def _metavar(one: Option) -> str:
    if one.field.metadata.get("metavar"):
        return one.field.metadata["metavar"]
    kind = typing.get_args(one.kind)[0] if typing.get_origin(one.kind) in (list, tuple) else one.kind
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(dict.fromkeys(map(str, typing.get_args(kind))))}}}"
    if dataclasses.is_dataclass(kind):
        return "MAPPING"
    return {bool: "true|false" if one.default is True else "", int: "INT", float: "FLOAT", str: "TEXT"}[kind]


@functools.cache
def docs(kind: type) -> dict[str, str]:
    """Docstrings of a dataclass's fields, inherited ones included, each on one line without its full stop."""
    explained = {field.name: field.metadata["doc"] for field in dataclasses.fields(kind) if "doc" in field.metadata}
    if explained:
        return explained
    for one in reversed([one for one in kind.__mro__ if dataclasses.is_dataclass(one)]):
        (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(one))).body)
        for field, after in itertools.pairwise([*body, None]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                doc = " ".join(str(after.value.value).split()).rstrip(".") if is_doc else ""
                # A redeclared field without a docstring inherits it.
                explained[field.target.id] = doc or explained.get(field.target.id, "")
    return explained


def of_function(function: Callable[..., Any]) -> type:
    """Make a dataclass of a function's parameters, documented by the `Args:` of its docstring."""
    about, _, after = inspect.getdoc(function).partition("\n\nArgs:\n")
    lines = re.findall(r"^ +(\w+): ((?:.|\n {5,})+)", after.partition("\n\n")[0], re.MULTILINE)
    explained = {name: " ".join(text.split()).rstrip(".") for name, text in lines}
    hints, fields = typing.get_type_hints(function), []
    for one in inspect.signature(function).parameters.values():
        default = dataclasses.MISSING if one.default is one.empty else one.default
        kind = str if hints[one.name] == str | Path else hints[one.name]
        fields.append((one.name, kind, dataclasses.field(default=default, metadata={"doc": explained[one.name]})))
    made = dataclasses.make_dataclass("Options", fields, frozen=True)
    made.__doc__ = about
    return made


# Programs -------------------------------------------------------------------------------------------------------------


def carry_out(
    program: str,
    args: Sequence[str],
    verbs: Mapping[str, str],
    package: str,
    about: str,
    check: Callable[[Any], None] = lambda chosen: None,
) -> int:
    """Run a command line with the module of `package` named by its first word; returns the exit status.

    The module has `run(options) -> exit status`, whose annotation is the dataclass of its options, and `EXAMPLE`, the
    end of its help. `check` gets the options before the module is run.
    """
    name = verb(program, args, verbs, about)
    if name is None:
        return 0
    module = import_module(f"{package}.{name.replace('-', '_')}")
    chosen = read(options_of(module), args[1:], f"{program} {name}", examples=module.EXAMPLE)
    if sys.stdout is None:  # the next file opened would get its number and receive the answers
        raise ValueError("standard output is closed; redirect it to /dev/null")
    check(chosen)
    return module.run(chosen)


def options_of(module: types.ModuleType) -> type:
    """The dataclass of options that a module's `run` takes."""
    return next(iter(typing.get_type_hints(module.run).values()))


def verb(program: str, args: Sequence[str], verbs: Mapping[str, str], about: str) -> str | None:
    """The first word of a command line, one of `verbs`; None for `--help` and `--version`, which are then printed.

    `verbs` maps each to its purpose. ValueError, naming the closest, for another word.
    """
    if args and args[0] == "--version":
        print(PROJECT, version())
        return None
    if args and args[0] in ("-h", "--help"):
        wide = max(map(len, verbs))
        print(about.strip(), "", *(f"  {name:<{wide}}  {what}".rstrip() for name, what in verbs.items()), "", sep="\n")
        print(f"List the options of one with `{program} VERB --help`.")
        return None
    if args and args[0] in verbs:
        return args[0]
    problem = f"there is no command {args[0]!r}" if args else "no command given"
    closest = difflib.get_close_matches(args[0], verbs, n=1) if args else []
    remedy = f"did you mean {closest[0]}?" if closest else f"give one of {', '.join(verbs)}"
    raise ValueError(f"{problem}; {remedy} (see {program} --help)")
