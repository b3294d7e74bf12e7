"""`capfilt score`: generate and match texts for every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from blip.options import argument, flat, option
from capfilt.commands.plan import refuse_drift
from capfilt.settings import ScoreConfig, ScoreOptions

EXAMPLE = """\
Every row gets an annotation, whatever happens to it; nothing is dropped here. It can be killed at any time: the same
command continues, even with another batch size, number of processes or engine, and the result is the same.

  capfilt score run --dry-run                       # estimates the time
  capfilt score run --limit 10000                   # rows from all over the input; a full run continues from there
  srun capfilt score run                            # each task takes its share of the parts, and the GPU of its own
  accelerate launch -m capfilt score run            # likewise; on one machine `capfilt launch run` does the same
  capfilt score run --engine ray                    # one scorer per GPU of a cluster
  capfilt score run --also language --also embedding      # in the same pass, or in one of their own over what is scored
"""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Engine."""

    engine: Literal["embedded", "ray"] = "embedded"
    """Engine: this process alone, or `ray` for several GPUs or machines"""
    workers: int | None = None
    """Scorers that Ray runs (default: one per GPU)"""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; `auto` is the GPU of the local rank, if there is one"""
    also: list[str] = option(list, metavar="SCORER", repeat=True)
    """Further scorer, kept in RUN/extra: language, aesthetic=MODEL, embedding (the filter's, of each image), or a class
    of one's own, package.module:Class or PATH.py:Class, whose code is run; may be repeated"""
    dry_run: bool = False
    """Score 64 rows, estimate how long all would take, write nothing"""

    def __post_init__(self) -> None:
        if self.workers is not None and self.engine != "ray":
            raise ValueError(f"--workers is for --engine ray, got --engine {self.engine}")


@dataclass(frozen=True, kw_only=True)
class ScoreVerb(EngineOptions):
    """Generate and match texts for every row; repeat the command to continue."""

    run: str = argument("RUN")
    """Folder of a planned run"""
    how: ScoreOptions = flat(skip=("rank", "world"))
    """How the work is done (no result depends on it)"""
    planned: dict[str, Any] = flat(part=ScoreConfig)
    """Plan settings (must match the plan)"""


def run(options: ScoreVerb) -> int:
    """Score what is left of a run; returns the exit status."""
    from capfilt.run import Run

    planned = Run.open(options.run)
    refuse_drift(planned, options.planned)
    return score(planned, options, options.how)


def score(run, engine: EngineOptions, how: ScoreOptions) -> int:
    """Score what is left, or estimate how long that takes, as one of the processes that a launcher starts."""
    import dataclasses

    from blip.processes import place
    from capfilt.score.make import scorer_maker

    rank, world = place()
    how = dataclasses.replace(how, rank=rank, world=world)
    maker = scorer_maker(engine.device)
    if engine.dry_run:
        from capfilt.score.dry_run import dry_run

        if engine.also:
            print("the estimate is for captioner and filter, without --also")
        return dry_run(run, maker, how)
    if engine.also and engine.engine == "ray":
        raise ValueError("--also is not for --engine ray: score with ray first, then again with --also and without ray")
    if engine.engine == "ray":
        from capfilt.score.ray_engine import score_with_ray

        return score_with_ray(run, engine.device, how, engine.workers)
    if engine.also:
        from capfilt.extra.score import score_also

        return score_also(run, engine.also, maker, how, engine.device)
    from capfilt.score import loop

    return loop.score(run, maker, how)
