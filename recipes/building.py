"""What recipes start from: a model of a size, its tokenizer and first weights, the data, and the synthetic world."""

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
from blip.tokenizer import Tokenizer
from blip.world import files

Model = TypeVar("Model")
"""`Blip` or a task model of `blip.models.families`."""
TrainingData = tuple[Draws | Stream, str]
"""Training data as `blip.train.loop.fit` asks for it, and the fingerprint that tells it from other data."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model to train and what it starts from."""

    size: Literal["tiny", "small", "base", "large"] | None = None
    """Preset of `blip.models.presets`; base when not given."""
    image_size: int | None = None
    """Side of the input, pixels; the model's when not given."""
    patch_size: int | None = None
    """Side of a patch, pixels; the preset's when not given."""
    drop_path: float | None = None
    """Stochastic depth of the image encoder, the probability at its last block; 0 when not given."""
    dropout: float | None = None
    """Dropout of the text transformer; when not given 0.1, or 0 if it is narrower than that of base."""
    patch_drop: float = 0.0
    """Share of patches left out in training (FLIP); faster and approximate."""
    checkpoint: bool = False
    """Recompute the image encoder's blocks in the backward pass to save memory."""
    tokenizer: str | None = None
    """`world`, a folder or file with a vocabulary, or a name on the hub; bert-base-uncased when not given."""
    vision_weights: str | None = None
    """First weights of the image encoder: a timm model name, whose architecture it then has, or a local .safetensors
    or .pth file."""
    text_weights: str | None = None
    """First weights of the text transformer: BERT by name on the hub, or its local folder."""
    start_from: str | None = None
    """A model folder, a released .pth or a name on the hub to continue from instead; it brings its own size, weights
    and, unless it is a .pth, tokenizer. A task model starts from a pre-trained `Blip`, or goes on from one of its own
    kind."""

    @property
    def origin(self) -> str:
        """Where training started, in words."""
        return f"from {self.start_from}" if self.start_from else "from first weights"


@dataclass(frozen=True)
class World:
    """Data of the synthetic world, drawn to disk before a run unless they are there."""

    folder: str = "runs/world"
    """Folder of the data: FOLDER/train.json, FOLDER/val.json and FOLDER/test.json with their images."""
    train: int = 20000
    """Training images."""
    held_out: int = 200
    """Images of each of val and test."""
    image_size: int = 64
    """Side of the images, pixels."""

    def draw(self) -> None:
        """Have the main process write the splits that are not there yet; the others wait."""
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
    """Images of the synthetic world with captions, drawn to disk before a run unless they are there."""

    web: bool = False
    """Noisy web texts on the training images instead of five true captions each."""
    noise: float = files.NOISE
    """Share of web texts that are not right."""
    workers: int = 1
    """Processes that draw."""

    def write(self, split: str, count: int) -> object:
        """Write images and their captions."""
        noise = {"web": self.web, "noise": self.noise} if split == "train" else {}
        return files.write(self.folder, "json", split, count, size=self.image_size, workers=self.workers, **noise)


@dataclass(frozen=True)
class TaskData(DataConfig):
    """Training data of a task whose samples are not captions."""

    crop_scale_min: float = 0.5
    """Smallest share of the image that a random crop shows; 1 shows the whole image."""

    samples = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt.strip():
            raise ValueError(f"data.prompt is not for {self.samples}")


def build_model(choice: ModelChoice, seed: int) -> tuple[Blip, Tokenizer]:
    """Build the model and tokenizer of a choice; new weights, and what is drawn after them, are functions of the seed.

    ValueError for a choice that contradicts the model to start from.
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
    """`Blip` itself, or a task model, which starts from the `Blip` of a choice or the task model that it names.

    What `Blip` lacks is a function of the seed; `shape` is what the task's `from_blip` takes. ValueError as in
    `build_model`, or if the task model that is gone on from has another shape.
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
    """What a choice starts from; a missing file is reported by the name of the option."""
    try:
        return checkpoint.opened(choice.start_from)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model.start_from: {error}; is its run finished?") from None


def _continued(
    kind: type[Model], choice: ModelChoice, start: checkpoint.Own | Foreign, seed: int
) -> tuple[Model, Tokenizer]:
    """The model that a choice starts from, to be trained as the choice says.

    Seeds PyTorch, so that what an objective draws at random, as the first rows of its queues, follows from the seed.
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
    """An image encoder's configuration with what a choice says of its weights and its input."""
    named = architecture(choice.vision_weights) if choice.vision_weights else None
    if named not in (None, config.model):
        config = VisionConfig(named, image_size=config.image_size)
    names = ("image_size", "patch_size")
    chosen = {name: getattr(choice, name) for name in names if getattr(choice, name) is not None}
    return dataclasses.replace(config, **chosen)


def _options(choice: ModelChoice, usual: TrainingOptions) -> TrainingOptions:
    """Training options of a choice, with the usual ones of the model where it leaves them open."""
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
    """What a size says of a model: all that its weights depend on but vocabulary, input and patches."""
    vision, text = config.vision, config.text
    image_encoder = (vision.model, vision.width, vision.depth, vision.heads, vision.hidden)
    return *image_encoder, text.width, text.layers, text.heads, text.hidden, text.max_positions, config.embed_dim


def build_feed(config: DataConfig, image_size: int, tokenizer: Tokenizer, seed: int) -> TrainingData:
    """Build the stream of training captions of a run."""
    prepare = PrepareCaptions(TrainTransform(image_size, config), tokenizer, config)
    return feed_of(open_captions(config), prepare, seed)


def feed_of(sources: Sequence[Any], prepare: Prepare, seed: int) -> TrainingData:
    """Samples that `prepare` makes of the records of some sources."""
    feed = (Stream if prepare.config.streaming else Draws)(sources, prepare, seed)
    _say_notes(sources)
    return feed, feed.fingerprint()


def _say_notes(sources: Sequence[Any]) -> None:
    """Print on stderr, once a run, what sources leave out."""
    if dist.is_main():
        for note in (note for source in sources for note in getattr(source, "notes", ())):
            print(f"note: {note}", file=sys.stderr, flush=True)
