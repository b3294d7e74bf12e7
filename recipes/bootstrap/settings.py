"""Settings of the bootstrapping experiment."""

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
    """The images: for each seed a crawl and a few with human captions, and two held-out sets for all seeds."""

    crawl: int = 16000
    """Number of images in a crawl, each with a web text."""
    noise: float = 0.6
    """Share of the web texts that are not right."""
    people: int = 2400
    """Number of images with human captions, on which every model is trained, too."""
    test: int = 200
    """Number of held-out images for retrieval and captioning."""
    composition: int = 200
    """Number of held-out images of colour-shape pairs never seen in training, for zero-shot captioning."""
    image_size: int = 63
    """Side of the images in pixels."""
    workers: int = 1
    """Number of processes that draw."""


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning; all else is as in caption_world.yaml and filter_world.yaml."""

    captioner: int = 150
    """Fine-tuning steps of a captioner."""
    retrieval: int = 150
    """Fine-tuning steps of a retrieval model or filter."""
    captioner_lr: float | None = None
    """Peak learning rate of a captioner; that of caption_world.yaml by default."""
    retrieval_lr: float | None = None
    """Peak learning rate of a retrieval model or filter; that of filter_world.yaml by default."""

    def __post_init__(self) -> None:
        check_rates(self, "captioner_lr", "retrieval_lr")


@dataclass(frozen=True)
class Larger:
    """A captioner and a filter larger than the models trained on the texts that they clean."""

    model: ModelChoice = field(default_factory=ModelChoice)
    """Size and input of the larger models."""
    steps: int = 400
    """Pre-training steps of the larger model, on the crawl as it is."""
    cleaners: FineTuning = field(default_factory=FineTuning)
    """Fine-tuning of the larger captioner and filter."""
    captioner: str | None = None
    """Folder of a captioner to use instead of training one; give it with `filter`."""
    filter: str | None = None
    """Folder of a filter to use instead of training one; give it with `captioner`."""

    def __post_init__(self) -> None:
        if (self.captioner is None) != (self.filter is None):
            raise ValueError("only one of larger.captioner and larger.filter is given: give both or neither")


@dataclass(frozen=True)
class Cleaning:
    """Settings of CapFilt."""

    decode: str = "nucleus"
    """Decoding preset of the captioner: a name in blip.inference.settings.DECODE_PRESETS."""
    beam: str = "caption_2022"
    """Decoding preset of the row with beam search."""
    threshold: float = 0.5
    """Lowest P(match) of a text that is kept."""


@dataclass(frozen=True)
class BootstrapRun:
    """The experiment. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: results.json, table.md, report.html, times.json, and a folder for each seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds to run, as in `--seeds 0 1`."""
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    """Rows to run, as in `--rows neither both`."""
    table: bool = False
    """Only print the table of what is done."""
    world: BootstrapWorld = field(default_factory=BootstrapWorld)
    """The images."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """Size and input of the models that are compared."""
    larger: Larger = field(default_factory=Larger)
    """Captioner and filter of the row with larger ones."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images and texts are read; leave `sources` empty."""
    people_share: float = 0.23
    """Share of the pairs with human captions in every row's pre-training."""
    objective: PretrainConfig = field(default_factory=PretrainConfig)
    """The three losses of pre-training; for every row `alpha_ramp_epochs` counts passes over the uncleaned crawl."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Pre-training, the same for every row; `seed` is replaced by each of `seeds`."""
    longer: float = 2.0
    """Steps of the row that trains longer, as a multiple of `train.steps`."""
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    """Fine-tuning before evaluation, the same for every row."""
    cleaners: FineTuning = field(default_factory=FineTuning)
    """Fine-tuning of the first row's model into captioner and filter."""
    cleaning: Cleaning = field(default_factory=Cleaning)
    """Settings of CapFilt."""
    k: int = 32
    """Candidates that the matching head re-ranks in retrieval."""
    shown: int = 12
    """Number of images in each part of the page."""

    def __post_init__(self) -> None:
        if unknown := [row for row in self.rows if row not in ROWS]:
            raise ValueError(f"unknown rows {', '.join(unknown)}: expected some of {', '.join(ROWS)}")
        if not self.rows or not self.seeds:
            raise ValueError("rows or seeds is empty: give at least one of each")
        if self.data.sources:
            raise ValueError("data.sources must be empty: the run creates its own sources")
        if not 0 < self.people_share < 1:
            raise ValueError(f"people_share must be between 0 and 1, got {self.people_share}")
        if self.train.steps is None:
            raise ValueError("train.steps is missing: give the number of steps that every row takes")
        if self.longer < 1:
            raise ValueError(f"longer must be 1 or more, got {self.longer}")
