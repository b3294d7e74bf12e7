"""`capfilt calibrate`: find a threshold."""

from __future__ import annotations

from dataclasses import dataclass

from blip.options import argument, flat
from capfilt.settings import DONE, CalibrateOptions

EXAMPLE = """\
  capfilt calibrate run --count 300                        # writes a sheet to label and a page with the images
  capfilt calibrate run --labels run/report/audit.csv      # precision and recall by threshold, with intervals
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


def run(options: CalibrateVerb) -> int:
    """Calibrate and print the result."""
    from capfilt.calibrate.threshold import calibrate
    from capfilt.run import Run
    from capfilt.score.make import scorer_maker

    print(*calibrate(Run.open(options.run), options.how, scorer_maker(options.how.device)), sep="\n")
    return DONE
