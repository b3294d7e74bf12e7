"""`capfilt launch`: score with one process per GPU of this machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from blip.options import option, written
from capfilt.commands.plan import refuse_drift
from capfilt.commands.score import EngineOptions, ScoreVerb
from capfilt.settings import ScoreOptions

EXAMPLE = """\
Each process takes a fixed share of the parts and a GPU of its own. One that dies stops no other; the same command
continues, even with another number of GPUs. `capfilt run --gpus 8` also plans, selects, exports and reports.

  capfilt launch run                                # all GPUs
  capfilt launch run --gpus 8 --batch 512
  srun --ntasks-per-node=1 capfilt launch run       # machines with equally many GPUs
"""


@dataclass(frozen=True, kw_only=True)
class LaunchVerb(ScoreVerb):
    """Score with one process per GPU of this machine; repeat the command to continue."""

    gpus: str = option("all", metavar="N")
    """GPUs to use, a number or `all`; with --device cpu, the number of processes"""


def run(options: LaunchVerb) -> int:
    """Score what is left of a run; returns the exit status."""
    from capfilt.run import Run

    planned = Run.open(options.run)
    refuse_drift(planned, options.planned)
    return launch(planned, options, options.how, options.planned, options.gpus)


def launch(run, engine: EngineOptions, how: ScoreOptions, settings: dict[str, Any], gpus: str) -> int:
    """Score a run with a process per GPU, each with these options; returns the exit status of all together."""
    from capfilt.score.launch import count_of
    from capfilt.score.launch import launch as start

    if engine.engine != "embedded":
        raise ValueError(f"--gpus starts processes of its own, and --engine {engine.engine} too: give one of them")
    if engine.dry_run:
        raise ValueError("--dry-run is for one process: give it without --gpus, to `capfilt score` or `capfilt run`")
    shared = {one.name: getattr(engine, one.name) for one in dataclasses.fields(EngineOptions)}
    verb = ScoreVerb(run=run.where, how=how, planned=settings, **shared)
    return start(run, written(verb), count_of(gpus, engine.device))
