"""Settings of the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip.data.settings import DataConfig
from blip.objectives.pretrain import PretrainConfig
from blip.settings import check_rates
from blip.train.settings import TrainConfig
from recipes.bootstrap.rows import ROWS
from recipes.building import ModelChoice


@dataclass(frozen=True)
class BootstrapWorld:
    """The images: a crawl and a few with human captions for each seed, and two held-out sets for all."""

    crawl: int = 16000
    """Images of a crawl, with web texts."""
    noise: float = 0.6
    """Share of the web texts that are not right."""
    people: int = 2400
    """Images with human captions, which every model learns from, too."""
    test: int = 200
    """Held-out images for retrieval and captions."""
    composition: int = 200
    """Held-out images of colour-shape pairs that no model has seen: the zero-shot captions."""
    image_size: int = 63
    """Side of the images, pixels."""
    workers: int = 1
    """Processes that draw."""


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning; what is not here is as in caption_world.yaml and filter_world.yaml."""

    captioner: int = 150
    """Steps of fine-tuning a captioner."""
    retrieval: int = 150
    """Steps of fine-tuning a retrieval model, which the filter is."""
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
    """Size and input of the larger models."""
    steps: int = 400
    """Steps of pre-training the larger models, on the crawl as it is."""
    cleaners: FineTuning = field(default_factory=FineTuning)
    """Fine-tuning of the larger captioner and filter."""
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
    """Preset of blip.inference.settings.DECODE_PRESETS by which captions are generated."""
    beam: str = "caption_2022"
    """Preset of the row that searches instead of sampling."""
    threshold: float = 0.5
    """Least P(match) of a text that is kept."""


@dataclass(frozen=True)
class BootstrapRun:
    """The experiment. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder: results.json, table.md, report.html, times.json, and a folder for each seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds to work on; `--seeds 0 1` for some of them."""
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    """Rows to work on; `--rows neither both` for some of them."""
    table: bool = False
    """Do nothing but print the table of what is done."""
    world: BootstrapWorld = field(default_factory=BootstrapWorld)
    """The images."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The models that are compared."""
    larger: Larger = field(default_factory=Larger)
    """Captioner and filter of the row with larger ones."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images and texts are read; the sources are the run's own."""
    people_share: float = 0.23
    """Share of the pairs with human captions in every row's pre-training."""
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
    """Images in each part of the page."""

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
