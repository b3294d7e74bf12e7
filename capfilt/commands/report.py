"""`capfilt report`: write an HTML page of accounts, distributions and images."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from blip.options import argument, flat
from capfilt.settings import DONE, ReportOptions

EXAMPLE = ""


@dataclass(frozen=True, kw_only=True)
class ReportVerb:
    """Write one HTML page: accounts, distributions, images with the texts kept and why."""

    run: str = argument("RUN")
    """Folder of a scored run"""
    page: ReportOptions = flat()
    """What the report page shows"""


def run(options: ReportVerb) -> int:
    """Write the page and print where it is."""
    from capfilt.report.write import report
    from capfilt.run import Run

    run = Run.open(options.run)
    page = report(run, options.page)
    if run.config.scorer == "fake":
        print("note: the scores are made up (--scorer fake): the report is a rehearsal", file=sys.stderr)
    print(page)
    return DONE
