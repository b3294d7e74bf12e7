"""The command `python -m capfilt`: clean a web crawl of images and texts with a captioner and a filter."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from blip import options
from blip.app import exit

ABOUT = """\
Clean a noisy crawl of images and texts: a captioner generates, a filter matches, and what matches is kept.

  python -m capfilt plan --input 'cc/{00000..00331}.tar' --out run --captioner models/captioner --filter models/filter
  python -m capfilt score run                    # again continues; RANK and WORLD_SIZE of a launcher share the work
  python -m capfilt report run                   # look before you choose
  python -m capfilt select run --policy blip --itm 0.5 --name half
  python -m capfilt export run --select half --format wds --to clean
  python -m capfilt run --input cc --out run --filter models/filter --to clean      # all of it

Exit status: 0 done, 2 wrong use or damaged source files, 3 parts that failed or are not scored, 4 the accounts do not
agree, 130 interrupted. docs/capfilt.md has the whole story.
"""
VERBS = {
    "plan": "list the input and freeze it in parts; no GPU needed",
    "score": "generate and match texts for every row; the same command continues",
    "select": "choose texts by their scores; takes seconds, as often as wanted",
    "export": "write what a selection keeps as a data set",
    "report": "one HTML page: accounts, distributions, images with what was kept and why",
    "verify": "prove that every row is accounted for and every file is as written",
    "calibrate": "find a threshold: labelled audit, clean reference set, or null floor",
    "status": "how far a run is, from its files alone",
    "retry-failed": "give parts that failed another chance",
    "run": "plan, score, select, export, report and verify in one go",
}
"""Modules of capfilt.commands with what each is for."""


def main(args: list[str] | None = None) -> int:
    """Run `args`, by default the process's own; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if os.environ.get("CAPFILT_TRACEBACK"):
        return options.carry_out("capfilt", args, VERBS, "capfilt.commands", ABOUT)
    try:
        return exit.run(lambda: options.carry_out("capfilt", args, VERBS, "capfilt.commands", ABOUT), also=RuntimeError)
    except SystemExit as stop:
        return 0 if stop.code == exit.PIPE_CLOSED else stop.code or 0  # `| head` has seen enough


def command() -> NoReturn:
    """The program `capfilt`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
