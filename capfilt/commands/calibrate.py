"""`capfilt calibrate`: find a threshold."""

from __future__ import annotations

from dataclasses import dataclass

from blip.options import argument, flat
from capfilt.settings import DONE, CalibrateOptions

EXAMPLE = """\
  capfilt calibrate run --count 300 --judge                  # draws texts; a page to judge them with keys
  capfilt calibrate run --labels run/report/audit/labels.csv # precision and recall by threshold, with intervals
  capfilt calibrate run --method reference --reference coco_val.json
  capfilt calibrate run --method null --count 2000
"""


@dataclass(frozen=True, kw_only=True)
class CalibrateVerb:
    """Find a threshold: labelled audit, clean reference set, or null floor."""

    run: str = argument("RUN")
    """Folder of a scored run"""
    how: CalibrateOptions = flat()
    """How the threshold is calibrated"""
    judge: bool = False
    """Serve the audit's page on this machine and save each answer in report/audit/labels.csv"""
    port: int = 0
    """Port of the page (default: any that is free)"""

    def __post_init__(self) -> None:
        if self.port and not self.judge:
            raise ValueError("--port is of the page to judge with: give --judge, too")


def run(options: CalibrateVerb) -> int:
    """Calibrate and print the result."""
    from capfilt.calibrate.threshold import calibrate
    from capfilt.run import Run
    from capfilt.score.make import scorer_maker

    if options.judge:
        if options.how.method != "audit" or options.how.labels:
            raise ValueError("--judge is for drawing and judging: it goes with --count alone")
        from capfilt.calibrate import audit

        server = audit.judge(Run.open(options.run), options.how.count, options.port)
        print(f"Judge at {server.address} (Ctrl-C stops; answers are saved)", flush=True)
        server.until_interrupted()
        return DONE
    print(*calibrate(Run.open(options.run), options.how, scorer_maker(options.how.device)), sep="\n")
    return DONE
