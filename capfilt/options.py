"""Command-line options out of dataclasses: the field's docstring is the help, its type says what may be given."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def add(parser: argparse.ArgumentParser, kind: type, *, skip: tuple[str, ...] = (), title: str) -> None:
    """Add an option for each field of a dataclass but those skipped. What is not given stays out of the result."""
    group = parser.add_argument_group(title)
    said, hints = _docs(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        option, default = f"--{field.name.replace('_', '-')}", _shown(field)
        what: dict[str, Any] = {"help": said[field.name].replace("%", "%%") + default, "default": argparse.SUPPRESS}
        value = _inner(hints[field.name])
        if value is bool:
            group.add_argument(option, action="store_true", **what)
        elif typing.get_origin(value) is typing.Literal:
            group.add_argument(option, choices=typing.get_args(value), **what)
        else:
            group.add_argument(option, type=value, metavar=value.__name__.upper(), **what)


def build(kind: type[T], given: argparse.Namespace, **more: Any) -> T:
    """The dataclass of the options that were given."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in vars(given).items() if k in names} | more)


def _inner(hint: Any) -> Any:
    """`int` of `int | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _shown(field: dataclasses.Field) -> str:
    default = field.default
    return "" if default in (None, False, dataclasses.MISSING) else f" [{default}]".replace("%", "%%")


def _docs(kind: type) -> dict[str, str]:
    """The docstring after each field."""
    (body,) = (n.body for n in ast.parse(inspect.getsource(kind)).body if isinstance(n, ast.ClassDef))
    found = {}
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[field.target.id] = " ".join(str(after.value.value).split()) if is_doc else ""
    return found
