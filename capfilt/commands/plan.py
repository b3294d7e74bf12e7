"""`capfilt plan`: list the input and split it into parts."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from blip.options import flat, option
from capfilt.settings import DONE, WRONG, ReadConfig, ScoreConfig, decided, resolve

EXAMPLE = """\
The plan is made once and never changed: the rows, the parts they are in, and all settings that decide results, with the
SHA-256 of the models. Repeating the command changes nothing; other settings are refused, and the differences listed.

  capfilt plan --input 'cc/{00000..00331}.tar' --out run --captioner models/captioner --filter models/filter
  capfilt plan --out run --extend --input 'cc/{00332..00400}.tar'      # old rows keep their ids and scores
"""


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Input and run."""

    input: list[str] = option(list, metavar="PATH", repeat=True)
    """File, folder, glob, list like {0..9}.tar or {a,b}.tar, or hf:NAME[@REVISION]; may be repeated"""
    out: str = option(metavar="RUN")
    """Folder of the run, or an object store's address"""
    part_size: int | None = None
    """Rows scored and committed together (default: 1024 with a GPU, 64 without)"""
    allow_damaged: bool = False
    """Exit 0 even if source files are damaged"""
    reading: dict[str, Any] = flat(part=ReadConfig, skip=("inputs",))
    """How the input is read"""
    scoring: dict[str, Any] = flat(part=ScoreConfig)
    """How rows are scored (part of the plan's fingerprint)"""


@dataclass(frozen=True, kw_only=True)
class PlanVerb(InputOptions):
    """List the input and split it into parts; no GPU needed."""

    extend: bool = False
    """Add new files to a planned run"""


def run(options: PlanVerb) -> int:
    """Make or extend the plan; returns the exit status."""
    from capfilt import plan
    from capfilt.run import Run

    if not options.extend:
        return make(options)
    refuse_drift(Run.open(options.out), {**options.reading, **options.scoring}, options.part_size)
    planned, new = plan.extend(options.out, options.input)
    print(f"{len(new)} new files with {sum(s.rows for s in new):,} rows")
    return _described(planned, options.allow_damaged)


def make(options: InputOptions) -> int:
    """Make the plan and print a summary; returns WRONG for damaged sources that are not allowed."""
    from capfilt import plan

    reading = ReadConfig(inputs=options.input, **options.reading)
    return _described(
        plan.make(options.out, ScoreConfig(**options.scoring), reading, options.part_size), options.allow_damaged
    )


def _described(run, allow_damaged: bool) -> int:
    size = sum(s.size for s in run.sources.values())
    print(
        f"{run.where}: {run.rows:,} rows of {len(run.sources)} files ({size / 1e9:.2f} GB) in {len(run.plan):,} parts "
        f"of up to {run.job['part_size']}; fingerprint {run.fingerprint}"
    )
    for source in run.sources.values():
        for note in source.notes:
            print(f"  {source.relpath}: {note}")
    if run.config.scorer == "blip":
        exact = run.config.precision == "float32"
        print(f"computes in {run.config.precision}; " + (
            "on a GPU, --precision bfloat16 is several times as fast" if exact else
            "a text or score may depend on its batch, and with --precision float32 it does not"))  # fmt: skip
        print("`capfilt score RUN --dry-run` estimates how long scoring will take")
    damaged = run.damaged()
    for source in damaged:
        print(f"source_damaged: {source.path}: {source.damage}", file=sys.stderr)
    if damaged and not allow_damaged:
        print(f"{len(damaged)} damaged: only readable rows are planned; --allow-damaged accepts that", file=sys.stderr)
        return WRONG
    return DONE


def refuse_drift(run, given: dict[str, Any], part_size: int | None = None) -> None:
    """Raise ValueError if a given setting, or a model on disk, differs from the plan."""
    from capfilt.plan import drift

    def now(planned: ScoreConfig | ReadConfig):
        return dataclasses.replace(planned, **{k: v for k, v in given.items() if hasattr(planned, k)})

    changes = drift(run, resolve(decided(now(run.config), run.config)), now(run.reading), part_size)
    if changes:
        raise ValueError(
            f"{run.where} was planned with other settings: {'; '.join(changes)}. Nothing was touched; plan another run "
            "for them"
        )
