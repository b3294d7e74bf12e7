"""`capfilt inspect`: look through a run in the browser."""

from __future__ import annotations

from dataclasses import dataclass

from blip.options import argument
from capfilt.settings import DONE

EXAMPLE = """\
  capfilt inspect run                      # every row; filter by score, rule, shard, text, status, source
  capfilt inspect run --select kept        # with the verdicts of a selection
"""


@dataclass(frozen=True, kw_only=True)
class InspectVerb:
    """Look through a run in the browser: images, texts, scores and why each text is kept or dropped."""

    run: str = argument("RUN")
    """Folder of a scored run"""
    select: str | None = None
    """Name of a selection (default: every text with P(match) of at least 0.5)"""
    port: int = 0
    """Port of the page (default: any that is free)"""


def run(options: InspectVerb) -> int:
    """Serve the page until Ctrl-C."""
    from capfilt.report.inspect import inspect
    from capfilt.run import Run

    server = inspect(Run.open(options.run), options.select, options.port)
    print(f"Look at {server.address} (Ctrl-C stops)", flush=True)
    server.until_interrupted()
    return DONE
