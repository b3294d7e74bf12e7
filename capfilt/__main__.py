"""The command `python -m capfilt`: clean a web crawl of images and texts with a captioner and a filter."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NoReturn

from capfilt.settings import DONE, WRONG

ABOUT = """\
Clean a noisy crawl of images and texts: a captioner writes, a filter reads, and what matches is kept.

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
    "score": "write and match texts for every row; the same command continues",
    "select": "choose texts by their scores; takes seconds, as often as wanted",
    "export": "write what a selection keeps as a data set",
    "report": "one HTML page: accounts, distributions, pictures with what was kept and why",
    "verify": "prove that every row is accounted for and every file is as written",
    "calibrate": "find a threshold: labelled audit, clean reference set, or null floor",
    "status": "how far a run is, from its files alone",
    "retry-failed": "give parts that failed another chance",
    "run": "plan, score, select, export, report and verify in one go",
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"error: {message} (`{self.prog} --help` lists the options)\n")


def main(args: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    parser = _Parser("capfilt", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    from capfilt import verbs as actions  # light: everything heavy is imported by the verb that needs it

    wanted = next((a for a in args if not a.startswith("-")), None)
    for verb, summary in VERBS.items():
        one = verbs.add_parser(
            verb, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if verb == wanted:
            actions.OPTIONS[verb](one)
    given = parser.parse_args(args)
    try:
        return actions.ACTIONS[given.verb](given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("CAPFILT_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {_one_line(error)}\n")
        return WRONG


def _one_line(error: Exception) -> str:
    return re.sub(r":?\s*\n\s*", ": ", str(error).strip()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
