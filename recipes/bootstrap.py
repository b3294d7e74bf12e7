"""The paper's Table 1 in kind, on the picture world: what captioning and filtering a noisy crawl are worth.

    blip-recipe bootstrap --config recipes/configs/bootstrap_world.yaml     # 2 CPU cores; it says how long

For each seed a model is pre-trained on a noisy crawl, and becomes a captioner and a filter on a few pictures by people.
CapFilt cleans the crawl with them in several ways, and on each result a model of the same size is pre-trained from
nothing for as many steps, fine-tuned and measured (paper, sections 4.3 and 4.4). Writes results.json, table.md and
report.html. The same command continues after a kill; started twice at once it shares the work. See docs/bootstrap.md.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip import dist
from blip.config import DataConfig, PretrainConfig, TrainConfig, check_rates
from recipes import bootstrap_plan, bootstrap_report, command
from recipes.bootstrap_rows import ROWS
from recipes.building import ModelChoice


@dataclass(frozen=True)
class World:
    """The pictures: a crawl and a few by people for each seed, and two held-out sets for all."""

    crawl: int = 16000
    """Pictures of a crawl, with web texts."""
    noise: float = 0.6
    """Share of the web texts that are not right."""
    people: int = 2400
    """Pictures with captions by people, which every model learns from, too."""
    test: int = 200
    """Held-out pictures for retrieval and captions."""
    composition: int = 200
    """Held-out pictures of colour-shape pairs that nobody has seen: the zero-shot captions."""
    image_size: int = 63
    """Side, pixels."""
    workers: int = 1
    """Processes that draw."""


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning; what is not here is as in caption_world.yaml and filter_world.yaml."""

    captioner: int = 150
    """Of a captioner."""
    retrieval: int = 150
    """Of a retrieval model, which the filter is."""
    captioner_lr: float | None = None
    """Peak learning rate of a captioner; caption_world.yaml's when not given."""
    retrieval_lr: float | None = None
    """Peak learning rate of a retrieval model; filter_world.yaml's when not given."""

    def __post_init__(self) -> None:
        check_rates(self, "captioner_lr", "retrieval_lr")


@dataclass(frozen=True)
class Larger:
    """The captioner and filter that are larger than the models that learn from what they clean."""

    model: ModelChoice = field(default_factory=ModelChoice)
    """Their size and input."""
    steps: int = 400
    """Steps of their pre-training, on the crawl as it is."""
    cleaners: FineTuning = field(default_factory=FineTuning)
    """How they are made captioner and filter."""
    captioner: str | None = None
    """Folder of a captioner to take instead; then nothing larger is trained. Goes with `filter`."""
    filter: str | None = None
    """Folder of a filter to take instead."""

    def __post_init__(self) -> None:
        if (self.captioner is None) != (self.filter is None):
            raise ValueError("larger.captioner and larger.filter go together: give both or none")


@dataclass(frozen=True)
class Cleaning:
    """How a crawl is cleaned."""

    decode: str = "nucleus"
    """Preset of blip.config.DECODE_PRESETS by which captions are written."""
    beam: str = "caption_2022"
    """Preset of the row that searches instead of sampling."""
    threshold: float = 0.5
    """Least P(match) of a text that is kept."""


@dataclass(frozen=True)
class Run:
    """The experiment. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder: results.json, table.md, report.html, times.json, and a folder for each seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds to work on; `--seeds 0 1` for some of them."""
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    """Rows to work on; `--rows neither both` for some of them."""
    table: bool = False
    """Do nothing but print the table of what is done."""
    world: World = field(default_factory=World)
    """The pictures."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The models that are compared."""
    larger: Larger = field(default_factory=Larger)
    """Captioner and filter of the row with larger ones."""
    data: DataConfig = field(default_factory=DataConfig)
    """How pictures and texts are read; the sources are the run's own."""
    people_share: float = 0.23
    """Share of the pairs by people in every row's pre-training."""
    objective: PretrainConfig = field(default_factory=PretrainConfig)
    """The three losses of pre-training; `alpha_ramp_epochs` are passes over the crawl as it is, for every row."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Pre-training, the same for every row; its seed is the run's."""
    longer: float = 2.0
    """Steps of the row that trains longer, in steps of the others."""
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    """The fine-tuning after which a row is measured, the same for every row."""
    cleaners: FineTuning = field(default_factory=FineTuning)
    """How the first model is made captioner and filter."""
    cleaning: Cleaning = field(default_factory=Cleaning)
    """How the crawl is cleaned."""
    k: int = 32
    """Candidates that are re-ranked in retrieval."""
    shown: int = 12
    """Pictures in each part of the page."""

    def __post_init__(self) -> None:
        if unknown := [row for row in self.rows if row not in ROWS]:
            raise ValueError(f"rows {', '.join(unknown)}: there are {', '.join(ROWS)}")
        if not self.rows or not self.seeds:
            raise ValueError("give at least one of rows and one of seeds")
        if self.data.sources:
            raise ValueError("data.sources are made by the run itself: leave them out")
        if not 0 < self.people_share < 1:
            raise ValueError(f"people_share must be between 0 and 1, got {self.people_share}")
        if self.train.steps is None:
            raise ValueError("train.steps must be given: every row takes as many")
        if self.longer < 1:
            raise ValueError(f"longer must be 1 or more, got {self.longer}")


# The command ----------------------------------------------------------------------------------------------------------


def bootstrap(run: Run) -> dict[str, Any]:
    """Do all that is not done, and write the table of all that is; returns what results.json holds."""
    dist.start()
    if dist.world() > 1:
        raise ValueError("one process does one stage: start the command twice instead of launching two processes")
    everything = bootstrap_plan.plan(dataclasses.replace(run, rows=list(ROWS), seeds=_seeds(run)))
    done = bootstrap_report.complete(everything)

    def tell() -> None:
        """Write the table again whenever a row is done for a seed, by whomever."""
        nonlocal done
        if (now := bootstrap_report.complete(everything)) != done:
            done = now
            bootstrap_report.write(everything, run)

    if not run.table:
        bootstrap_plan.plan(run).carry_out(tell)
    return bootstrap_report.write(everything, run)


def _seeds(run: Run) -> list[int]:
    """The seeds of a run, and those that others have worked on in its folder."""
    found = [folder.name.removeprefix("seed-") for folder in Path(run.out).glob("seed-*")]
    return sorted({*run.seeds, *(int(seed) for seed in found if seed.isdigit())})


def spelled(args: list[str]) -> list[str]:
    """`--seeds 0 1 --rows neither both --table` as the parser of options takes it."""
    found: list[str] = []
    for arg in args:
        if arg == "--table":
            found.append("--table=true")
        elif arg in ("--seeds", "--rows"):
            found.append(f"{arg}=[]")
        elif found and found[-1].startswith(("--seeds=[", "--rows=[")) and not arg.startswith("--"):
            name, _, before = found[-1].partition("=")
            found[-1] = f"{name}=[{', '.join([*filter(None, [before[1:-1]]), arg.strip('[]')])}]"
        else:
            found.append(arg)
    return found


def main() -> None:
    run = command.read(Run, spelled(sys.argv[1:]))
    bootstrap(run)
    print((Path(run.out) / "table.md").read_text())
    print(f"{run.out}/report.html, {run.out}/results.json, {run.out}/table.md")


if __name__ == "__main__":
    command.run(main)
