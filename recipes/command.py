"""Command line and exit status of a recipe."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from blip import options
from blip.app.exit import WRONG_USE, fail, one_line, run
from blip.options import content

__all__ = ["WRONG_USE", "content", "fail", "read", "run"]

Settings = TypeVar("Settings")


def read(settings: type[Settings], args: Sequence[str] | None = None) -> Settings:
    """Build `settings` from `--config FILE.yaml` and `--any.option value`; errors end the process with status 2.

    `--help` lists every option with its meaning, `--print-config` prints the effective YAML.
    """
    args = sys.argv[1:] if args is None else args
    recipe = Path(inspect.getfile(settings)).relative_to(Path(__file__).parent).parts[0].removesuffix(".py")
    try:
        return options.read(settings, args, f"blip-recipe {recipe}", files=True)
    except (ValueError, OSError) as error:
        fail(one_line(error), WRONG_USE)
