"""`capfilt status`: progress of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass

from blip.options import argument
from capfilt.settings import DONE

EXAMPLE = ""


@dataclass(frozen=True, kw_only=True)
class StatusVerb:
    """Show the progress of a run, read from its files alone."""

    run: str = argument("RUN")
    """Folder of a run"""
    json: bool = False
    """Print JSON"""


def run(options: StatusVerb) -> int:
    """Print the progress of the run."""
    from capfilt.run import Run
    from capfilt.status import lines, status

    state = status(Run.open(options.run))
    print(json.dumps(state) if options.json else "\n".join(lines(state)))
    return DONE
