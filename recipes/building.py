"""Building blocks of recipes: a model, its tokenizer and initial weights, the data, and the synthetic world."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from blip import dist
from blip.checkpoints import checkpoint
from blip.checkpoints.foreign import Foreign
from blip.checkpoints.initial import architecture, initial_text, initial_vision
from blip.data.draws import Draws, Prepare
from blip.data.prepare.captions import PrepareCaptions, open_captions
from blip.data.settings import DataConfig
from blip.data.stream import Stream
from blip.data.transforms import TrainTransform
from blip.models.blip import Blip
from blip.models.families import TASKS
from blip.models.presets import PRESETS, usual_options
from blip.models.settings import BlipConfig
from blip.nn.settings import TrainingOptions, VisionConfig
from blip.origin import OTHER
from blip.tokenizer import Tokenizer
from blip.world import files

Model = TypeVar("Model")
"""`Blip` or a task model of `blip.models.families`."""
TrainingData = tuple[Draws | Stream, str]
"""Training data for `blip.train.loop.fit`, and its fingerprint."""


@dataclass(frozen=True)
class ModelChoice:
    """Model to train, and its initial weights."""

    size: Literal["tiny", "small", "base", "large"] | None = None
    """Preset of `blip.models.presets`; base if unset."""
    image_size: int | None = None
    """Side of the input, pixels; the model's if unset."""
    patch_size: int | None = None
    """Side of a patch, pixels; the preset's if unset."""
    drop_path: float | None = None
    """Stochastic depth of the image encoder, the probability at its last block; 0 if unset."""
    dropout: float | None = None
    """Dropout of the text transformer; if unset 0.1, or 0 below the width of base."""
    patch_drop: float = 0.0
    """Share of patches left out in training (FLIP); faster and approximate."""
    checkpoint: bool = False
    """Recompute the image encoder's blocks in the backward pass to save memory."""
    tokenizer: str | None = None
    """`world`, a folder or file with a vocabulary, or a name on the hub; bert-base-uncased if unset."""
    vision_weights: str | None = None
    """Initial weights of the image encoder: the name of a timm model, which also sets its architecture, or a local
    .safetensors or .pth file."""
    text_weights: str | None = None
    """Initial weights of the text transformer: BERT by its name on the hub, or in a local folder."""
    start_from: str | None = None
    """Model to start from instead: a model folder, a released .pth or a name on the hub, with its own size, weights
    and, unless it is a .pth, tokenizer. A task model starts from a pre-trained `Blip` or from one of its own kind."""

    @property
    def origin(self) -> str:
        """Where training started, in words."""
        return f"from {self.start_from}" if self.start_from else "from initial weights"

    def trained_on(self) -> tuple[str, ...]:
        """Origins of the images behind the initial weights of the image encoder (`blip.origin`)."""
        if self.start_from:
            return checkpoint.trained_on(self.start_from) or (OTHER,)
        return (OTHER,) if self.vision_weights else ()


@dataclass(frozen=True)
class World:
    """Data of the synthetic world, written to disk before a run unless they exist."""

    folder: str = "runs/world"
    """Folder of the data: FOLDER/train.json, FOLDER/val.json and FOLDER/test.json with their images."""
    train: int = 20000
    """Training images."""
    held_out: int = 200
    """Images of each of val and test."""
    image_size: int = 64
    """Side of the images, pixels."""

    def draw(self) -> None:
        """Write missing splits in the main process, while the others wait."""
        if dist.is_main():
            for split, count in (("train", self.train), ("val", self.held_out), ("test", self.held_out)):
                if not (Path(self.folder) / self.file(split)).exists():
                    self.write(split, count)
        dist.barrier()

    def file(self, split: str) -> str:
        """Name of the file that is written last of a split."""
        return f"{split}.json"

    def write(self, split: str, count: int) -> object:
        """Write a split."""
        raise NotImplementedError


@dataclass(frozen=True)
class WorldChoice(World):
    """Images of the synthetic world with captions, written to disk before a run unless they exist."""

    web: bool = False
    """Noisy web texts on the training images instead of five true captions each."""
    noise: float = files.NOISE
    """Share of web texts that are wrong."""
    workers: int = 1
    """Number of processes that draw."""

    def write(self, split: str, count: int) -> object:
        """Write images and their captions."""
        noise = {"web": self.web, "noise": self.noise} if split == "train" else {}
        return files.write(self.folder, "json", split, count, size=self.image_size, workers=self.workers, **noise)


@dataclass(frozen=True)
class TaskData(DataConfig):
    """Training data of a task whose samples are not captions."""

    crop_scale_min: float = 0.5
    """Smallest share of the image in a random crop; 1 for the whole image."""

    samples = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt.strip():
            raise ValueError(f"data.prompt is not for {self.samples}")
        if self.remote:
            raise ValueError(f"data.remote is not for {self.samples}: these are read from this machine")


def build_model(choice: ModelChoice, seed: int) -> tuple[Blip, Tokenizer]:
    """Build the model and tokenizer of a choice; new weights, and later random draws, are functions of the seed.

    ValueError if the choice contradicts the model to start from.
    """
    if choice.start_from:
        return _continued(Blip, choice, _opened(choice), seed)
    tokenizer = Tokenizer.load(choice.tokenizer or "bert-base-uncased")
    preset = PRESETS[choice.size or "base"]
    torch.manual_seed(seed)
    text = tokenizer.text_config(preset.text)
    config = dataclasses.replace(preset, vision=_vision(choice, preset.vision), text=text)
    model = Blip(config, _options(choice, usual_options(text)))
    if choice.vision_weights:
        initial_vision(model, choice.vision_weights, option="--model.vision_weights")
    if choice.text_weights:
        initial_text(model, choice.text_weights, tokenizer, option="--model.text_weights")
    return model, tokenizer


def build_task(kind: type[Model], choice: ModelChoice, seed: int, **shape: Any) -> tuple[Model, Tokenizer]:
    """Build a `Blip`, or a task model that starts from the choice's `Blip` or from a task model of the same kind.

    Weights that `Blip` lacks are functions of the seed; `shape` holds arguments of the task's `from_blip`. ValueError
    as in `build_model`, or if the task model to start from has another shape.
    """
    if kind is Blip:
        return build_model(choice, seed)
    start = _opened(choice) if choice.start_from else None
    if start and TASKS[start.task].model is kind:
        model, tokenizer = _continued(kind, choice, start, seed)
        for name, value in shape.items():
            if (has := getattr(model.config, name)) != value:
                raise ValueError(f"model.start_from {choice.start_from} has {name} {has}, this run needs {value}")
        return model, tokenizer
    blip, tokenizer = _continued(Blip, choice, start, seed) if start else build_model(choice, seed)
    torch.manual_seed(seed + 1)
    return kind.from_blip(blip, **shape), tokenizer


def _opened(choice: ModelChoice) -> checkpoint.Own | Foreign:
    """Open the model that a choice starts from; an error about a missing file names the option."""
    try:
        return checkpoint.opened(choice.start_from)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model.start_from: {error}; is its run finished?") from None


def _continued(
    kind: type[Model], choice: ModelChoice, start: checkpoint.Own | Foreign, seed: int
) -> tuple[Model, Tokenizer]:
    """Load the model that a choice starts from, with the choice's training options.

    Seeds PyTorch, so that later random draws, such as the first rows of an objective's queues, depend on the seed.
    """
    torch.manual_seed(seed)
    size, words = choice.image_size, choice.tokenizer
    try:
        options = _options(choice, start.options or usual_options(start.model_config.text))
        model, tokenizer = checkpoint.from_pretrained(start, kind, image_size=size, tokenizer=words, options=options)
    except ValueError as error:
        raise ValueError(f"model.start_from {choice.start_from}: {error}") from None
    _refuse_contradiction(choice, model.config)
    return model, tokenizer


def _vision(choice: ModelChoice, config: VisionConfig) -> VisionConfig:
    """Configure the image encoder: a preset's shapes, changed by a choice of weights, image size and patch size."""
    named = architecture(choice.vision_weights) if choice.vision_weights else None
    if named not in (None, config.model):
        config = VisionConfig(named, image_size=config.image_size)
    names = ("image_size", "patch_size")
    chosen = {name: getattr(choice, name) for name in names if getattr(choice, name) is not None}
    return dataclasses.replace(config, **chosen)


def _options(choice: ModelChoice, usual: TrainingOptions) -> TrainingOptions:
    """Training options of a choice; those that it leaves unset are the model's usual ones."""
    chosen = {} if choice.drop_path is None else {"drop_path": choice.drop_path}
    if choice.dropout is not None:
        chosen |= {"dropout": choice.dropout, "attention_dropout": choice.dropout}
    return dataclasses.replace(usual, patch_drop=choice.patch_drop, checkpoint=choice.checkpoint, **chosen)


def _refuse_contradiction(choice: ModelChoice, config: BlipConfig) -> None:
    start = f"model.start_from {choice.start_from}"
    for name in ("vision_weights", "text_weights"):
        if value := getattr(choice, name):
            raise ValueError(
                f"{start} brings its own weights, so model.{name} {value} would not be used: leave one out"
            )
    if choice.patch_size not in (None, config.vision.patch_size):
        raise ValueError(f"{start} has its own patches, not of {choice.patch_size} pixels: leave model.patch_size out")
    if choice.size and _shape(PRESETS[choice.size]) != _shape(config):
        sizes = [size for size, preset in PRESETS.items() if _shape(preset) == _shape(config)]
        raise ValueError(
            f"{start} is a model of {'size ' + sizes[0] if sizes else 'a size of its own'}, not {choice.size}: "
            "leave model.size out"
        )


def _shape(config: BlipConfig) -> tuple:
    """Shapes that a preset sets: all that weights depend on but vocabulary, image size and patch size."""
    vision, text = config.vision, config.text
    image_encoder = (vision.model, vision.width, vision.depth, vision.heads, vision.hidden)
    return *image_encoder, text.width, text.layers, text.heads, text.hidden, text.max_positions, config.embed_dim


def build_feed(config: DataConfig, image_size: int, tokenizer: Tokenizer, seed: int) -> TrainingData:
    """Build the stream of training captions of a run."""
    prepare = PrepareCaptions(TrainTransform(image_size, config), tokenizer, config)
    return feed_of(open_captions(config), prepare, seed)


def feed_of(sources: Sequence[Any], prepare: Prepare, seed: int) -> TrainingData:
    """Build the stream of samples that `prepare` makes from the records of some sources."""
    feed = (Stream if prepare.config.streaming else Draws)(sources, prepare, seed)
    _say_notes(sources)
    return feed, feed.fingerprint()


def _say_notes(sources: Sequence[Any]) -> None:
    """Print on stderr, once per run, notes about what sources leave out."""
    if dist.is_main():
        for note in (note for source in sources for note in getattr(source, "notes", ())):
            print(f"note: {note}", file=sys.stderr, flush=True)
