"""The command `python -m capfilt`: clean a web crawl of images and texts with a captioner and a filter."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from blip import options
from blip.app import exit
from blip.errors import DOCS

ABOUT = f"""\
Clean a noisy crawl of images and texts: a captioner adds synthetic texts, and a filter keeps the texts that match.

  python -m capfilt plan --input 'cc/{{00000..00331}}.tar' --out run --captioner models/captioner --filter models/filter
  python -m capfilt score run                    # repeat to continue; the processes of a launcher share the work
  python -m capfilt report run                   # look at the scores first
  python -m capfilt select run --policy blip --itm 0.5 --name half
  python -m capfilt export run --select half --format wds --to clean
  python -m capfilt run --input cc --out run --filter models/filter --to clean      # all steps

Exit status: 0 done, 2 wrong use or damaged source files, 3 parts that failed or are not scored, 4 accounts that do not
agree, 130 interrupted. See "CapFilt: cleaning a
crawl" at {DOCS}.
"""
VERBS = {
    "plan": "list the input and split it into parts; no GPU needed",
    "score": "generate and match texts for every row; repeat to continue",
    "launch": "score with one process per GPU of this machine; repeat to continue",
    "concepts": "list the words and pairs of words of a run's texts, for a balanced selection",
    "select": "choose texts by their scores; takes seconds, can be repeated",
    "export": "write the texts of a selection as a data set",
    "report": "write an HTML page: accounts, distributions, images with the texts kept and why",
    "inspect": "look through a run in the browser, filtered by score, rule, shard, text or status",
    "verify": "check that every row is accounted for and every file is as written",
    "calibrate": "find a threshold: labelled audit, clean reference set, or null floor",
    "status": "show the progress of a run, from its files alone",
    "retry-failed": "release failed parts, to be scored again",
    "run": "plan, score, select, export, report and verify in one go",
}
"""Modules of capfilt.commands, and the purpose of each."""


def main(args: list[str] | None = None) -> int:
    """Run `args`, by default the process's own; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if os.environ.get("CAPFILT_TRACEBACK"):
        return options.carry_out("capfilt", args, VERBS, "capfilt.commands", ABOUT)
    try:
        return exit.run(lambda: options.carry_out("capfilt", args, VERBS, "capfilt.commands", ABOUT), also=RuntimeError)
    except SystemExit as stop:
        return 0 if stop.code == exit.PIPE_CLOSED else stop.code or 0  # `| head` has closed the pipe


def command() -> NoReturn:
    """Entry point of the program `capfilt`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
