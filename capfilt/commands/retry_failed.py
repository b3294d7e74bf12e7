"""`capfilt retry-failed`: release failed parts, to be scored again."""

from __future__ import annotations

from dataclasses import dataclass

from blip.options import argument
from capfilt.settings import DONE

EXAMPLE = ""


@dataclass(frozen=True, kw_only=True)
class RetryVerb:
    """Release failed parts, to be scored again."""

    run: str = argument("RUN")
    """Folder of a run"""


def run(options: RetryVerb) -> int:
    """Forget the failures and print how many parts that concerns."""
    from capfilt.run import Run
    from capfilt.status import retry_failed

    run = Run.open(options.run)
    print(f"{retry_failed(run)} failed parts released; score them with `{run.command('score')}`")
    return DONE
