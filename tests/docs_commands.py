"""The commands of README.md and docs/: found, read to the end by the parser that is theirs, and told what they need.

What a command reads has to be there for a reader who went through the pages: a folder of `runs/` that a command of
these pages writes, or the reader's own images (`photo.jpg`, `photos/`) and files (`mine/`). What reads anything else
says so, `# needs COCO`, and that mark is all that tests know of such a command.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
OURS = ("python", "accelerate", "torchrun", "blip", "blip-eval", "blip-recipe", "make")
"""Programs whose command lines are read."""
OTHERS = {
    "cd",
    "cp",
    "curl",
    "docker",
    "export",
    "git",
    "hf",
    "kill",
    "mkdir",
    "open",
    "pip",
    "scontrol",
    "sbatch",
    "source",
}
"""Programs that a page may name beside them."""
THEIRS = ("photo.jpg", "photos", "mine", ".")
"""What a reader has."""
WRITES = {"out", "to", "sheet", "dst", "destination", "done"}
"""Names of options that are written to."""
NAMES_A_FILE = re.compile(r".*(/|\.(jsonl?|csv|txt|yaml|tar|parquet|jpg|png|html|pth|safetensors)$)")
LINKED = {"tokenizer", "vision_weights", "text_weights"}
"""Options that are the name of something on a hub unless they are a file."""
MARK = re.compile(r"#\s*needs (.+?)\s*$")


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    line: int
    text: str
    needs: str | None
    """What the mark says."""
    inline: bool
    """In a sentence or a table, not in a block."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


class Unreadable(Exception):
    """A command line that its program would refuse."""


class _Read(Exception):
    """Carries what was read out of a program that is not to be run."""

    def __init__(self, what: Any) -> None:
        self.what = what


@dataclass(frozen=True)
class Reading:
    """What a command's own parser made of it."""

    program: str
    """`recipes.pretrain`, `blip caption`, `make demo`."""
    args: tuple[str, ...]
    values: dict[str, Any]
    """Options, or for recipes settings, under dotted names."""


# Finding them


@functools.cache
def commands() -> list[Command]:
    """Of all pages, in their order."""
    return [command for page in PAGES for command in commands_of(page)]


def commands_of(page: Path) -> list[Command]:
    """Of a page: what stands in blocks without a language, `bash` or `sh`, and whole command lines in backquotes."""
    name, documented, prose = str(page.relative_to(ROOT)), [], []
    for line, language, block in blocks(page.read_text()):
        if language is None:
            prose.append((line, block))
        elif language in ("", "bash", "sh"):
            documented += [Command(name, line + at, *_marked(text), False) for at, text in _joined(block)]
    for line, text in prose:
        for span in re.finditer(r"`([^`]+)`", text):
            words = " ".join(span[1].split())
            if _is_whole(words.split(" ")):
                documented.append(Command(name, line + text[: span.start()].count("\n"), *_marked(words), True))
    return sorted(documented, key=lambda one: one.line)


def blocks(text: str) -> Iterator[tuple[int, str | None, str]]:
    """First line, language (None for what is between fences) and content of each piece of a page."""
    start, language, piece = 1, None, []
    for number, line in enumerate(text.splitlines(), 1):
        if fence := re.match(r"\s*```(.*)$", line):
            yield start, language, "\n".join(piece)
            language = fence[1].strip() if language is None else None
            start, piece = number + 1, []
        else:
            piece.append(line)
    yield start, language, "\n".join(piece)


def _is_whole(words: list[str]) -> bool:
    """Whether a span is a command line, and not the name of a program, a verb or an option."""
    if words[0] not in OURS:
        return False
    name = {"python": 3, "accelerate": 4, "torchrun": 3}.get(words[0], 2)
    if words[:3] in (["python", "-m", "eval"], ["python", "-m", "capfilt"]):
        name = 4
    if words[0] == "make" or words[-1] == "--help":
        return True
    return len(words) > name + (words[name:][0].startswith("--") if len(words) > name else 0)


def _joined(block: str) -> Iterator[tuple[int, str]]:
    """Lines of a block that begin with a program, with those that continue them."""
    lines = block.split("\n")
    at = 0
    while at < len(lines):
        start, text = at, lines[at].strip()
        while text.endswith("\\") and at + 1 < len(lines):
            at += 1
            text = text[:-1].rstrip() + " " + lines[at].strip()
        at += 1
        if text.split(" ")[0] in {*OURS, *OTHERS, "srun"} or re.match(r"[A-Z_]+=\S+ ", text):
            yield start, text


def _marked(text: str) -> tuple[str, str | None]:
    mark = MARK.search(text)
    return text, mark[1] if mark else None


# Reading them


@functools.cache
def read(command: Command) -> list[Reading]:
    """What the parsers of a line's programs make of it; Unreadable with what they say.

    In a sentence, an option may be named without all that its command requires.
    """
    try:
        return [reading for words in simple(command.text) for reading in _read_one(words)]
    except Unreadable as error:
        if command.inline and re.search(r"(are|is) required", str(error)):
            return []
        raise


def simple(text: str) -> Iterator[list[str]]:
    """The commands that a shell would run for a line, without launchers of other people and settings before them."""
    text = re.sub(r"\$\{?\w+\}?", "1", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set("|&;"):
            words = list(_bare(words))
            if words:
                yield words
            words = []
        else:
            words.append(word)


def _bare(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words and words[0] == "srun":
        words = words[next(i for i, word in enumerate(words) if word in OURS) :]
    return words


def _read_one(words: list[str]) -> list[Reading]:
    program, *args = words
    if program == "make":
        return [reading for target in args if "=" not in target for reading in _target(target)]
    if program == "blip":
        return [_blip(args)]
    if program == "blip-eval":
        return [_eval(args)]
    if program == "blip-recipe":
        return [_recipe(args)]
    if program == "pip":
        _extras(args)
    if program not in OURS:
        if program not in OTHERS:
            raise Unreadable(f"no such program: {program}")
        return []
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = _quietly(lambda: get_args_parser().parse_args(args))
        return [_module(given.training_script, given.training_script_args, given.module)]
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        given = _quietly(lambda: launch_command_parser().parse_args(args[1:]))
        return [_module(given.training_script, given.training_script_args, given.module)]
    if args[0] != "-m":
        raise Unreadable(f"not a module: {' '.join(words)}")
    return [_module(args[1], args[2:], True)]


def _module(name: str, args: list[str], is_module: bool) -> Reading:
    if not is_module:
        raise Unreadable(f"{name} is started without -m")
    if name == "eval":
        return _eval(args)
    if name == "capfilt":
        return _capfilt(args)
    if name == "pytest" or name.startswith("tests.numbers"):
        return Reading(name, tuple(args), {})
    if name.split(".")[0] not in ("recipes", "blip", "benchmarks"):
        raise Unreadable(f"{name} is not ours")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unreadable(str(error)) from None
    if name.startswith("recipes."):
        return _ours(name, args, module.main)
    if name.startswith("blip.world."):
        return _ours(name, args, lambda: module.main(args))
    real_parse = argparse.ArgumentParser.parse_args

    def parses(parser: argparse.ArgumentParser, *given: Any) -> None:
        raise _Read(real_parse(parser, *given))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parses):
        return Reading(name, tuple(args), _flat(_stopped(module.main, name, args)))


def _ours(program: str, args: list[str], main: Any) -> Reading:
    """What the one function that reads options makes of them."""
    from blip import options

    real = options.read

    def reads(*given: Any, **more: Any) -> None:
        raise _Read(real(*given, **more))

    with mock.patch.object(options, "read", reads):
        return Reading(program, tuple(args), _flat(_stopped(lambda: sys.exit(main()), program, args)))


def _verb(program: str, args: list[str], main: Any) -> Reading:
    reading = _ours(program, args, lambda: main(args))
    return Reading(f"{program} {args[0]}", tuple(args[1:]), reading.values)


def _blip(args: list[str]) -> Reading:
    from blip.app import cli

    return _verb("blip", args, cli.main)


def _eval(args: list[str]) -> Reading:
    from eval.__main__ import main

    return _verb("eval", args, main)


def _recipe(args: list[str]) -> Reading:
    from recipes.__main__ import RECIPES

    if args[:1] == ["--help"]:
        return Reading("recipes", tuple(args), {})
    if args[0] not in RECIPES:
        raise Unreadable(f"blip-recipe has no {args[0]}")
    return _module(f"recipes.{args[0]}", args[1:], True)


def _capfilt(args: list[str]) -> Reading:
    from capfilt.__main__ import main

    return _verb("capfilt", args, main)


def _target(target: str) -> list[Reading]:
    """What the Makefile does for a target."""
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", makefile, re.M)
    if not rule:
        raise Unreadable(f"the Makefile has no target {target}")
    recipe = [line.strip().replace("$(BIN)/", "") for line in rule[1].splitlines()]
    readings = [Reading(f"make {target}", (), {})]
    for line in recipe:
        if line.startswith("python -m ") and "pytest" not in line and "sphinx" not in line:
            readings += _read_one(shlex.split(line))
    return readings


def _extras(args: list[str]) -> None:
    """Refuse an extra that there is not, and this project's name, which is on no index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    listed = {*project["dependencies"], *(one for extra in known.values() for one in extra)}
    for word in args:
        if re.match(r"[A-Za-z]", word) and word != "install" and word not in listed:
            raise Unreadable(f"pyproject.toml does not require {word}")
    for wanted in re.findall(r"\[([\w,]+)\]", " ".join(args)):
        if missing := set(wanted.split(",")) - known.keys():
            raise Unreadable(f"pyproject.toml has no extra {', '.join(sorted(missing))}")


def _stopped(main: Any, name: str, args: list[str]) -> Any:
    """What a program read, by way of _Read; None if it gave its help."""
    with mock.patch.object(sys, "argv", [name, *args]):
        try:
            _quietly(main)
        except _Read as read:
            return read.what
    return None


def _quietly(call: Any) -> Any:
    """Its result; what it says as it ends is in Unreadable, unless it is help."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            return call()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise Unreadable(output.getvalue().strip() or str(end.code)) from None
        return None


def _flat(settings: Any, before: str = "") -> dict[str, Any]:
    if dataclasses.is_dataclass(settings):
        settings = dataclasses.asdict(settings)
    elif isinstance(settings, argparse.Namespace) or hasattr(settings, "as_dict"):
        settings = dict(vars(settings))
    if isinstance(settings, dict):
        return {
            k: v for name, value in settings.items() for k, v in _flat(value, f"{before}.{name}".lstrip(".")).items()
        }
    if isinstance(settings, list | tuple):
        return {k: v for i, value in enumerate(settings) for k, v in _flat(value, f"{before}.{i}").items()}
    return {} if settings is None and not before else {before: settings}


# What they need


def reads_and_writes(reading: Reading) -> tuple[set[str], set[str]]:
    """Files and folders that a command reads, and those that it writes."""
    wanted, written = set(), set()
    for name, value in reading.values.items():
        parts = [part for part in name.split(".") if not part.isdigit()]
        if not isinstance(value, str) or not value:
            continue
        if parts[-1] in WRITES or name == "world.folder" or (reading.program, name) == ("blip convert", "folder"):
            written.add(value)
        elif parts[-1] in LINKED:
            wanted |= {value} - {"world", "auto", "java", "python"}
        elif NAMES_A_FILE.match(value) and parts[-1] not in {"text", "texts", "questions", "template", "sidecar"}:
            wanted.add(value)
    return wanted, written


@functools.cache
def made() -> set[str]:
    """All that those commands of the pages write which need nothing that is not there."""
    paths: set[str] = set()
    for command in commands():
        if command.needs:
            continue
        with contextlib.suppress(Unreadable):
            for reading in read(command):
                paths |= reads_and_writes(reading)[1]
    return {path.rstrip("/") for path in paths if path.startswith("runs/")}


def not_there(command: Command) -> set[str]:
    """What a command reads and a reader has not got."""
    wanted = {path for reading in read(command) for path in reads_and_writes(reading)[0]}
    return {path for path in wanted if not _is_there(path)}


def _is_there(path: str) -> bool:
    if path.startswith("runs/"):
        return any(path == out or path.startswith(f"{out}/") for out in made())
    return path.split("/")[0] in THEIRS or (ROOT / path).exists()
