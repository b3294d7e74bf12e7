"""The experiment of the paper's Table 1 on the synthetic world: what captioning and filtering a noisy crawl are worth.

    blip-recipe bootstrap --config recipes/configs/bootstrap_world.yaml     # 2 CPU cores; prints how long it takes

For each seed a model is pre-trained on a noisy crawl and fine-tuned into a captioner and a filter on a few images with
human captions. CapFilt cleans the crawl with them in several ways; on each result a model of the same size is
pre-trained from scratch for as many steps, fine-tuned and evaluated (paper, sections 4.3 and 4.4). Writes results.json,
table.md and report.html. Repeat the command to continue an interrupted run; two at a time share the work.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from blip import dist
from recipes import command
from recipes.bootstrap import plan, report
from recipes.bootstrap.rows import ROWS
from recipes.bootstrap.settings import BootstrapRun

# The command ----------------------------------------------------------------------------------------------------------


def bootstrap(run: BootstrapRun) -> dict[str, Any]:
    """Run the stages that are not done, and write the table; returns the contents of results.json."""
    dist.start()
    if dist.world() > 1:
        raise ValueError("each stage runs in one process: start the command twice instead of launching two processes")
    everything = plan.plan(dataclasses.replace(run, rows=list(ROWS), seeds=_seeds(run)))
    done = report.complete(everything)

    def write_table() -> None:
        """Write the table again whenever a process finishes a row of a seed."""
        nonlocal done
        if (now := report.complete(everything)) != done:
            done = now
            report.write(everything, run)

    if not run.table:
        plan.plan(run).carry_out(write_table)
    return report.write(everything, run)


def _seeds(run: BootstrapRun) -> list[int]:
    """The seeds of a run, and those of earlier runs in its folder."""
    names = [folder.name.removeprefix("seed-") for folder in Path(run.out).glob("seed-*")]
    return sorted({*run.seeds, *(int(seed) for seed in names if seed.isdigit())})


def spelled(args: list[str]) -> list[str]:
    """Rewrite `--seeds 0 1 --rows neither both --table` into the form that the option parser takes."""
    words: list[str] = []
    for arg in args:
        if arg == "--table":
            words.append("--table=true")
        elif arg in ("--seeds", "--rows"):
            words.append(f"{arg}=[]")
        elif words and words[-1].startswith(("--seeds=[", "--rows=[")) and not arg.startswith("--"):
            name, _, before = words[-1].partition("=")
            words[-1] = f"{name}=[{', '.join([*filter(None, [before[1:-1]]), arg.strip('[]')])}]"
        else:
            words.append(arg)
    return words


def main() -> None:
    run = command.read(BootstrapRun, spelled(sys.argv[1:]))
    bootstrap(run)
    print((Path(run.out) / "table.md").read_text())
    print(f"{run.out}/report.html, {run.out}/results.json, {run.out}/table.md")
