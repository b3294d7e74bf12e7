"""`capfilt run`: all steps in one go."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass

from blip.options import flat, option
from blip.processes import place
from capfilt.commands import export, launch, plan, report, score, select, verify
from capfilt.select.policies import SelectConfig
from capfilt.settings import DONE, FAILED_PARTS, WRONG, ReportOptions, ScoreOptions

EXAMPLE = """\
For the common case; each step is also a verb of its own. Repeat the command to continue an interrupted run; nothing is
scored twice. The first example is a rehearsal without models:

  capfilt run --input cc --out try --scorer fake --limit 1000
  capfilt run --input cc --out run --captioner models/captioner --filter models/filter --dry-run
  capfilt run --input cc --out run --captioner models/captioner --filter models/filter --to clean
  capfilt run --input cc --out run --captioner models/captioner --filter models/filter --to clean --gpus all

Then open run/report/default/report.html. Another selection takes seconds: capfilt select run --name strict --itm 0.8
"""


@dataclass(frozen=True, kw_only=True)
class RunVerb(select.EmptyOption, export.FormatOptions, score.EngineOptions, plan.InputOptions):
    """Plan, score, select, export, report and verify in one go."""

    gpus: str | None = option(None, metavar="N")
    """GPUs of this machine to score on, one process for each: a number, or `all` (default: this process alone)"""
    name: str = option("default", metavar="NAME")
    """Name of the selection"""
    to: str | None = option(None, metavar="FOLDER")
    """Folder to export to (default: RUN/exports/NAME)"""
    keep: SelectConfig = flat()
    """What is kept"""
    page: ReportOptions = flat(skip=("select", "to"))
    """What the report page shows"""
    how: ScoreOptions = flat(skip=("rank", "world", "allow_damaged"))
    """How the work is done"""


def run(options: RunVerb) -> int:
    """Run all steps in order; exit status 2 for damaged sources does not stop the rest."""
    _, world = place()
    if world > 1:
        raise ValueError(
            f"`capfilt run` is for one process, but a launcher started {world}: plan in one process, score in all, and "
            "when all are done select, export, report and verify in one"
        )
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:  # only for the estimate
            return _scored(dataclasses.replace(options, out=folder))
    status = _scored(options)
    if status not in (DONE, WRONG):
        return status
    where, name = options.out, options.name
    empty = {"allow_empty": options.allow_empty}
    ways = {one: getattr(options, one) for one in ("format", *export.LAYOUT)} | empty
    to = options.to or os.path.join(where, "exports", name)
    select.run(select.SelectVerb(run=where, name=name, replace=True, keep=options.keep, **empty))
    export.run(export.ExportVerb(run=where, select=name, to=to, replace=True, **ways))
    report.run(report.ReportVerb(run=where, page=dataclasses.replace(options.page, select=name)))
    verified = verify.run(verify.VerifyVerb(run=where))
    is_partial = verified == FAILED_PARTS and options.how.limit is not None  # the rest is beyond --limit
    return status if verified == DONE or is_partial else verified


def _scored(options: RunVerb) -> int:
    """Plan and score; returns the status of plan where scoring succeeded, else that of scoring."""
    from capfilt.run import Run

    planned = plan.make(options)
    how = dataclasses.replace(options.how, allow_damaged=options.allow_damaged)
    run = Run.open(options.out)
    scored = launch.launch(run, options, how, {}, options.gpus) if options.gpus else score.score(run, options, how)
    return planned or scored if scored in (DONE, WRONG) else scored
