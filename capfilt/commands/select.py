"""`capfilt select`: choose texts by their scores."""

from __future__ import annotations

from dataclasses import dataclass

from blip.options import argument, flat, option
from capfilt.select.policies import SelectConfig
from capfilt.settings import DONE

EXAMPLE = """\
A selection is a pure function of the annotations: another threshold takes seconds, and older selections are kept.

  capfilt select run --name half
  capfilt select run --name strict --itm 0.8 --rules datacomp-basic --duplicates phash64 --duplicate-bits 4
  capfilt select run --name table --policy threshold-table --itm-web 0.4 --itm-syn 0.7
"""


@dataclass(frozen=True, kw_only=True)
class EmptyOption:
    """Empty selections."""

    allow_empty: bool = False
    """Accept a selection that keeps no text"""


@dataclass(frozen=True, kw_only=True)
class SelectVerb(EmptyOption):
    """Choose texts by their scores; takes seconds and can be repeated."""

    run: str = argument("RUN")
    """Folder of a scored run"""
    name: str = option(metavar="NAME")
    """Name of the selection, e.g. half"""
    replace: bool = False
    """Remove an older selection of that name"""
    keep: SelectConfig = flat()
    """What is kept"""


def run(options: SelectVerb) -> int:
    """Make the selection and print its account."""
    from capfilt.run import Run
    from capfilt.select.choose import account_lines, select

    account = select(
        Run.open(options.run), options.name, options.keep, replace=options.replace, allow_empty=options.allow_empty
    )
    print(*account_lines(account), sep="\n")
    return DONE
