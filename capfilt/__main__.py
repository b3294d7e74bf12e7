"""The command `python -m capfilt`: clean a web crawl of images and texts with a captioner and a filter."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from blip.app.exit import leave, one_line

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
USAGE = {
    "plan": "--input PATH --out RUN --filter MODEL [--captioner MODEL] [options]",
    "score": "RUN [--engine ray] [--limit N] [options]",
    "select": "RUN --name NAME [--policy POLICY] [--itm FLOAT] [--rules PRESET] [options]",
    "export": "RUN --select NAME --to FOLDER [--format wds|parquet|json|uids] [options]",
    "run": "--input PATH --out RUN --filter MODEL [--captioner MODEL] [--to FOLDER] [options]",
}
MORE = {
    "plan": """
The plan is made once and never changed: which rows there are, in which parts, and all settings that decide results,
with the SHA-256 of the models. The same command again changes nothing; other settings are refused with what differs.

  capfilt plan --input 'cc/{00000..00331}.tar' --out run --captioner models/captioner --filter models/filter
  capfilt plan --out run --extend --input 'cc/{00332..00400}.tar'      # what is there keeps its ids and scores
""",
    "score": """
Every row gets a line of annotations, whatever happens to it; nothing is dropped here. Kill it when you like: the same
command continues, with another batch size, number of processes or engine if you wish, and the result is the same.

  capfilt score run --dry-run                       # how long it will take
  capfilt score run --limit 10000                   # a look at rows from all over; a full run continues from there
  accelerate launch -m capfilt score run            # RANK and WORLD_SIZE share the parts, without collectives
  capfilt score run --engine ray                    # one scorer per GPU of a cluster
""",
    "select": """
A pure function of the annotations: another threshold costs seconds, and older selections stay.

  capfilt select run --name half
  capfilt select run --name strict --itm 0.8 --rules datacomp-basic --duplicates phash64 --duplicate-bits 4
  capfilt select run --name table --policy threshold-table --itm-web 0.4 --itm-syn 0.7
""",
    "export": """
The original bytes of the images and the kept texts, as training reads them; the same selection gives the same bytes.
_SUCCESS comes last and lists every file with its SHA-256.

  capfilt export run --select half --format wds --to clean
""",
    "calibrate": """
  capfilt calibrate run --count 300                        # a sheet to label, and a page with the pictures
  capfilt calibrate run --labels run/report/audit.csv      # precision and recall by threshold, with intervals
  capfilt calibrate run --method reference --reference coco_val.json
  capfilt calibrate run --method null --count 2000
""",
    "run": """
For the common case; each step is also a verb of its own. The same command again continues where it was killed, and
scores nothing twice. To get a feeling for it before the models are there:

  capfilt run --input cc --out try --scorer fake --limit 1000
  capfilt run --input cc --out run --captioner models/captioner --filter models/filter --dry-run
  capfilt run --input cc --out run --captioner models/captioner --filter models/filter --to clean

Then open run/report/default/report.html. Another choice costs seconds: capfilt select run --name strict --itm 0.8
""",
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        from capfilt.settings import WRONG

        self.exit(WRONG, f"error: {message} (`{self.prog} --help` lists the options)\n")


def main(args: list[str] | None = None) -> int:
    """Run a command line, or the process's own; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    parser = _Parser("capfilt", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    from capfilt import verbs as actions  # light: everything heavy is imported by the verb that needs it
    from capfilt.settings import DONE, WRONG

    wanted = next((a for a in args if not a.startswith("-")), None)
    for verb, summary in VERBS.items():
        one = verbs.add_parser(
            verb,
            usage=f"capfilt {verb} {USAGE.get(verb, 'RUN [options]')}",
            help=summary,
            description=f"{summary[:1].upper()}{summary[1:]}.\n{MORE.get(verb, '')}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
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
        sys.stderr.write(f"error: {one_line(error)}\n")
        return WRONG


def command() -> NoReturn:
    """The program `capfilt`."""
    leave(main)


if __name__ == "__main__":
    command()
