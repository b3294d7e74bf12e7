"""`capfilt retry-failed`: give parts that failed another chance."""

from __future__ import annotations

from dataclasses import dataclass

from blip.options import argument
from capfilt.settings import DONE

EXAMPLE = ""


@dataclass(frozen=True, kw_only=True)
class RetryVerb:
    """Give parts that failed another chance."""

    run: str = argument("RUN")
    """Folder of a run"""


def run(options: RetryVerb) -> int:
    """Forget the failures and print how many parts that concerns."""
    from capfilt.run import Run
    from capfilt.status import retry_failed

    print(f"{retry_failed(Run.open(options.run))} parts get another chance: run `capfilt score {options.run}`")
    return DONE
