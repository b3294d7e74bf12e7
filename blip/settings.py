"""Shared checks of settings: every field has its type and range, or an error names it."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_rates(settings: Any, *names: str) -> None:
    """Raise ValueError if one of these fields is given (not None) and is not a number of 0 or more."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or 0 <= value < float("inf"), f"{name} must be a number of 0 or more, got {value}")


def check_fractions(settings: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is in [0, 1)."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")


def check_positive(value: float, name: str) -> None:
    require(0 < value < float("inf"), f"{name} must be a positive number, got {value}")


LATER = {"later": True}
"""Marks a field absent from older model directories; absent means default."""


def between(low: float, high: float) -> dict[str, float]:
    """Metadata of a field: smallest and largest allowed value; wider than any model, narrower than memory."""
    return {"low": low, "high": high}


SIDE, WIDTH, DEPTH, HEADS = between(1, 1 << 13), between(1, 1 << 14), between(1, 128), between(1, 1 << 10)
SHARE, ID = between(0, 1), between(0, 1 << 24)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_types = functools.cache(get_type_hints)


def check_fields(settings: Any, where: str = "") -> None:
    """Raise ValueError, naming `where` and the field, for a value of the wrong type or out of range."""
    for one in dataclasses.fields(settings):
        kind, value = _types(type(settings))[one.name], getattr(settings, one.name)
        kinds = get_args(kind) or (kind,)
        low, high = one.metadata.get("low"), one.metadata.get("high")
        if get_origin(kind) is Literal:
            fits, wanted = value in kinds if isinstance(value, str) else False, f"one of {', '.join(kinds)}"
        elif (plain := kinds[0]) in _KINDS:
            numeric = isinstance(value, int if plain is int else (int, float)) and not isinstance(value, bool)
            fits = numeric if plain in (int, float) else isinstance(value, plain)
            wanted = _KINDS[plain]
            if low is not None:
                fits = fits and low <= value <= high
                wanted += f" from {low:g} to {high:,}"
            elif plain is float:
                fits = fits and abs(value) < float("inf")
        else:  # a part with a configuration of its own
            fits, wanted = isinstance(value, plain), f"a {getattr(plain, '__name__', plain)}"
        nothing = value is None and type(None) in kinds
        require(fits or nothing, f"{where}{one.name} must be {wanted}, got {reprlib.repr(value)}")


def known(cls: type, values: dict[str, Any], where: str, former: Sequence[str] = ()) -> dict[str, Any]:
    """Copy a mapping with the fields of a dataclass, without `former` ones; ValueError for a missing or unknown key."""
    require(isinstance(values, dict), f"{where} must be a mapping, got {type(values).__name__}")
    names = {f.name: "later" in f.metadata for f in dataclasses.fields(cls)}
    unknown = sorted(reprlib.repr(name) for name in set(values) - set(names) - set(former))
    missing = sorted(name for name, later in names.items() if name not in values and not later)
    require(not unknown, f"{where} has unknown keys: {', '.join(unknown[:3])}{', ...' * (len(unknown) > 3)}")
    require(not missing, f"{where} lacks keys: {', '.join(missing)}")
    return {name: value for name, value in values.items() if name in names}
