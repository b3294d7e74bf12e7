"""Every constant of the method, once, as frozen dataclasses with the presets TINY, SMALL, BASE and LARGE.

Units are said beside each field. "2022" marks what the original release did where our default differs;
`docs/differences.md` says why, and `recipes/configs/blip_2022.yaml` sets those of a pre-training.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import reprlib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_rates(settings: Any, *names: str) -> None:
    """Raise ValueError where one of these fields is given (not None) and no number of 0 or more."""
    for name in names:
        value = getattr(settings, name)
        _require(value is None or 0 <= value < float("inf"), f"{name} must be a number of 0 or more, got {value}")


def _check_positive(value: float, name: str) -> None:
    _require(0 < value < float("inf"), f"{name} must be a positive number, got {value}")


def _check_contrast(settings: PretrainConfig | RetrievalConfig) -> None:
    """What the contrastive parts of two objectives share."""
    _require(settings.queue_size >= 0, f"queue_size must be 0 or more, got {settings.queue_size}")
    _require(
        settings.queue_size <= _MOST_QUEUED, f"queue_size must be at most {_MOST_QUEUED:,}, got {settings.queue_size}"
    )
    _require(0 <= settings.momentum <= 1, f"momentum must be in [0, 1], got {settings.momentum}")
    _require(0 <= settings.alpha <= 1, f"alpha must be in [0, 1], got {settings.alpha}")
    check_rates(settings, "alpha_ramp_epochs", "negative_floor")
    low, high = settings.temperature_min, settings.temperature_max
    ordered = 0 < low <= high < float("inf")
    _require(ordered, f"temperature_min {low} and temperature_max {high} must be positive, the first not the larger")


_LATER = {"later": True}
"""Of a field that model directories may lack: those written before there was one mean its default."""


def _range(low: float, high: float) -> dict[str, float]:
    """Metadata of a field: least and largest value, both allowed; wider than any model, narrower than memory."""
    return {"low": low, "high": high}


_SIDE, _WIDTH, _DEPTH, _HEADS = _range(1, 1 << 13), _range(1, 1 << 14), _range(1, 128), _range(1, 1 << 10)
_SHARE, _ID = _range(0, 1), _range(0, 1 << 24)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_types = functools.cache(get_type_hints)


def _check_fields(settings: Any, where: str = "") -> None:
    """ValueError, naming `where` and the field, for a value that is not of its field's type or out of its range."""
    for one in dataclasses.fields(settings):
        kind, value = _types(type(settings))[one.name], getattr(settings, one.name)
        kinds = get_args(kind) or (kind,)
        low, high = one.metadata.get("low"), one.metadata.get("high")
        if get_origin(kind) is Literal:
            fits, wanted = value in kinds if isinstance(value, str) else False, f"one of {', '.join(kinds)}"
        elif (plain := kinds[0]) in _KINDS:
            numeric = isinstance(value, int if plain is int else (int, float)) and not isinstance(value, bool)
            fits = numeric if plain in (int, float) else isinstance(value, plain)
            wanted = _KINDS[plain]
            if low is not None:
                fits = fits and low <= value <= high
                wanted += f" from {low:g} to {high:,}"
            elif plain is float:
                fits = fits and abs(value) < float("inf")
        else:  # a part with a configuration of its own
            fits, wanted = isinstance(value, plain), f"a {getattr(plain, '__name__', plain)}"
        nothing = value is None and type(None) in kinds
        _require(fits or nothing, f"{where}{one.name} must be {wanted}, got {reprlib.repr(value)}")


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder: any timm ViT by name; `None` keeps the value that the name implies."""

    model: str = "vit_base_patch16_224"
    """Name of an architecture of timm, without the name of weights."""
    image_size: int = field(default=224, metadata=_SIDE)
    """Side of the square input, pixels."""
    patch_size: int | None = field(default=None, metadata=_SIDE)
    """Side of a patch, pixels."""
    width: int | None = field(default=None, metadata=_WIDTH)
    """Width of a token."""
    depth: int | None = field(default=None, metadata=_DEPTH)
    """Number of blocks."""
    heads: int | None = field(default=None, metadata=_HEADS)
    """Number of attention heads."""
    drop_path: float = field(default=0.0, metadata=_SHARE)
    """Stochastic depth, probability at the last block."""
    patch_drop: float = field(default=0.0, metadata=_SHARE)
    """Share of patches left out in training (FLIP); an approximation that trades accuracy for speed."""
    checkpoint: bool = False
    """Recompute blocks in the backward pass to save memory."""
    init_gain: float | None = field(default=None, metadata=_range(0, 1000))
    """Deviation of first weights times sqrt(inputs), and positions as waves; `None` is timm's way, slow if narrow."""
    norm_eps: float | None = field(default=None, metadata=_LATER | _SHARE)
    """Epsilon of layer normalisation; 1e-6 in the ViTs of the 2022 release."""
    hidden: int | None = field(default=None, metadata=_LATER | _range(1, 1 << 17))
    """Width inside the feed-forward."""

    def __post_init__(self) -> None:
        _check_fields(self, "vision.")
        # timm would fetch what a name with a place in it says, and a model directory must not send anyone anywhere.
        _require(
            re.fullmatch(r"[A-Za-z0-9_]{1,100}", self.model) is not None,
            f"vision.model must be the name of an architecture of timm, such as vit_base_patch16_224, got "
            f"{reprlib.repr(self.model)}: a repository, an address, a path or the name of weights is not taken",
        )
        _require(self.drop_path < 1, f"drop_path must be in [0, 1), got {self.drop_path}")
        _require(self.patch_drop < 1, f"patch_drop must be in [0, 1), got {self.patch_drop}")
        whole = None in (self.width, self.heads) or self.width % self.heads == 0
        _require(whole, f"vision.width {self.width} is not a multiple of vision.heads {self.heads}")


@dataclass(frozen=True)
class TextConfig:
    """The text transformer (MED), BERT-shaped, and the ids of the special tokens that its weights were trained with."""

    vocab_size: int = field(default=30524, metadata=_range(1, 1 << 24))
    """Word pieces, [DEC] and [ENC] included."""
    width: int = field(default=768, metadata=_WIDTH)
    """Width of a token."""
    layers: int = field(default=12, metadata=_DEPTH)
    """Number of blocks."""
    heads: int = field(default=12, metadata=_HEADS)
    """Number of attention heads."""
    hidden: int = field(default=3072, metadata=_range(1, 1 << 17))
    """Width inside the feed-forward."""
    max_positions: int = field(default=512, metadata=_range(2, 1 << 20))
    """Longest text, tokens."""
    dropout: float = field(default=0.1, metadata=_SHARE)
    """Dropout of embeddings and block outputs."""
    attention_dropout: float = field(default=0.1, metadata=_SHARE)
    """Dropout of attention probabilities."""
    norm_eps: float = field(default=1e-12, metadata=_SHARE)
    """Epsilon of layer normalisation."""
    init_std: float = field(default=0.02, metadata=_range(0, 1000))
    """Standard deviation of initial weights."""
    pad_id: int = field(default=0, metadata=_ID)
    """[PAD]."""
    cls_id: int = field(default=101, metadata=_ID)
    """[CLS], first token of a text on its own."""
    sep_id: int = field(default=102, metadata=_ID)
    """[SEP], last token of every text."""
    dec_id: int = field(default=30522, metadata=_ID)
    """[DEC], first token of a text to be written."""
    enc_id: int = field(default=30523, metadata=_ID)
    """[ENC], first token of a text to be matched with an image."""

    def __post_init__(self) -> None:
        _check_fields(self, "text.")
        _require(self.width % self.heads == 0, f"text width {self.width} is not a multiple of {self.heads} heads")
        for name in ("pad_id", "cls_id", "sep_id", "dec_id", "enc_id"):
            value = getattr(self, name)
            _require(value < self.vocab_size, f"text.{name} {value} is outside the vocabulary of {self.vocab_size}")


@dataclass(frozen=True)
class BlipConfig:
    """The whole model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = field(default=256, metadata=_WIDTH)
    """Width of the joint embedding of images and texts."""
    temperature: float = field(default=0.07, metadata=_range(1e-4, 100))
    """Initial temperature of the contrastive softmax; learned."""
    parts: Literal["all", "writing", "matching"] = field(default="all", metadata=_LATER)
    """What a `Blip` has: all, or what a checkpoint of a captioner alone or of a matching model alone has."""

    def __post_init__(self) -> None:
        _check_fields(self)

    @property
    def encodes(self) -> bool:
        """Whether texts are embedded and matched with images."""
        return self.parts != "writing"

    @property
    def writes(self) -> bool:
        """Whether captions are written."""
        return self.parts != "matching"

    def require(self, *, encodes: bool = False, writes: bool = False) -> None:
        """ValueError, saying what to load instead, if a model lacks what compares texts with images, or what writes."""
        _require(
            self.encodes or not encodes,
            "this model only writes captions (it comes from a captioner's checkpoint) and cannot compare texts with "
            "pictures: give a pre-training, retrieval or matching checkpoint",
        )
        _require(
            self.writes or not writes,
            "this model only compares texts with pictures (it comes from a retrieval or matching checkpoint) and "
            "cannot write: give a captioning or pre-training checkpoint",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlipConfig:
        """Build from `to_dict`'s output, this or an earlier version's; ValueError names an unknown or missing key."""
        values = _known(cls, values, "model config")
        values["vision"] = VisionConfig(**_known(VisionConfig, values["vision"], "vision config"))
        values["text"] = TextConfig(**_known(TextConfig, values["text"], "text config"))
        return cls(**values)


@dataclass(frozen=True)
class NlvrModelConfig(BlipConfig):
    """A model that reasons over several images (paper, section 5.4)."""

    images: int = field(default=2, metadata=_range(2, 64))
    """Images of an example."""

    @classmethod
    def of(cls, config: BlipConfig, images: int) -> NlvrModelConfig:
        """The shape of a pre-trained model, for examples of some images."""
        return cls(config.vision, config.text, config.embed_dim, config.temperature, images=images)


@dataclass(frozen=True)
class DialogueModelConfig(BlipConfig):
    """A model that ranks answers in a dialogue about an image (paper, section 5.5)."""

    caption_sees_image: bool = False
    """Read the caption over the image instead of alone."""

    @classmethod
    def of(cls, config: BlipConfig, caption_sees_image: bool) -> DialogueModelConfig:
        """The shape of a pre-trained model, and how it reads captions."""
        sees = caption_sees_image
        return cls(config.vision, config.text, config.embed_dim, config.temperature, caption_sees_image=sees)


def _known(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    _require(isinstance(values, dict), f"{where} must be a mapping, got {type(values).__name__}")
    names = {f.name: "later" in f.metadata for f in dataclasses.fields(cls)}
    unknown = sorted(reprlib.repr(name) for name in set(values) - set(names))
    missing = sorted(name for name, later in names.items() if name not in values and not later)
    _require(not unknown, f"{where} has unknown keys: {', '.join(unknown[:3])}{', ...' * (len(unknown) > 3)}")
    _require(not missing, f"{where} lacks keys: {', '.join(missing)}")
    return dict(values)


TINY = BlipConfig(
    vision=VisionConfig(
        "vit_tiny_patch16_224", image_size=64, patch_size=16, width=128, depth=4, heads=4, init_gain=1.0
    ),
    text=TextConfig(
        width=128, layers=2, heads=2, hidden=512, max_positions=64, dropout=0.0, attention_dropout=0.0, init_std=0.05
    ),
    embed_dim=128,
)
SMALL = BlipConfig(
    vision=VisionConfig(
        "vit_small_patch16_224", image_size=64, patch_size=16, width=256, depth=6, heads=4, init_gain=1.0
    ),
    text=TextConfig(
        width=256, layers=4, heads=4, hidden=1024, max_positions=128, dropout=0.0, attention_dropout=0.0, init_std=0.04
    ),
    embed_dim=256,
)
BASE = BlipConfig()
LARGE = BlipConfig(vision=VisionConfig("vit_large_patch16_224"))
PRESETS: dict[str, BlipConfig] = {"tiny": TINY, "small": SMALL, "base": BASE, "large": LARGE}


_MOST_QUEUED = 1 << 22
"""Features in a queue; beyond that it is memory that is queued."""


@dataclass(frozen=True)
class PretrainConfig:
    """The three pre-training losses (paper, section 3.2) and their momentum teacher."""

    queue_size: int = 57600
    """Momentum features kept per modality; any size, 0 for none."""
    momentum: float = 0.995
    """Decay of the teacher's moving average, per step."""
    alpha: float = 0.4
    """Weight of the teacher's soft targets in the contrastive loss."""
    alpha_ramp_epochs: float = 2.0
    """Epochs over which alpha rises linearly from 0."""
    temperature_min: float = 0.001
    """Lower clamp of the learned temperature."""
    temperature_max: float = 0.5
    """Upper clamp of the learned temperature."""
    label_smoothing: float = 0.1
    """Of the language-modelling loss."""
    negative_floor: float = 1e-4
    """Added to each hard-negative sampling weight, so that no row underflows."""
    negatives_all_ranks: bool = False
    """Draw hard negatives from the batches of all processes, not only the local one."""
    teacher_dropout: bool = False
    """Leave dropout on in the teacher (2022: true)."""

    def __post_init__(self) -> None:
        _check_contrast(self)
        _require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class RetrievalConfig:
    """The retrieval fine-tune, which also gives a filter: ITC and ITM (paper, section 5.1), with a momentum teacher."""

    queue_size: int = 57600
    """Momentum features kept per modality, with the ids of their images; any size, 0 for none."""
    momentum: float = 0.995
    """Decay of the teacher's moving average, per step."""
    alpha: float = 0.4
    """Weight of the teacher's soft targets in the contrastive loss."""
    alpha_ramp_epochs: float = 1.0
    """Epochs over which alpha rises linearly from 0."""
    temperature_min: float = 0.001
    """Lower clamp of the learned temperature."""
    temperature_max: float = 0.5
    """Upper clamp of the learned temperature."""
    negative_floor: float = 0.0
    """Added to each hard-negative sampling weight; without it a row that underflows draws evenly from other images."""
    negatives_all_ranks: bool = False
    """Draw hard negatives from the batches of all processes, not only the local one."""
    teacher_dropout: bool = False
    """Leave dropout on in the teacher (2022: true)."""

    def __post_init__(self) -> None:
        _check_contrast(self)


@dataclass(frozen=True)
class CaptionConfig:
    """The fine-tuning of a captioner (paper, section 5.2); the prompt is the data's."""

    label_smoothing: float = 0.1
    """Of the language-modelling loss."""

    def __post_init__(self) -> None:
        _require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class VqaConfig:
    """The fine-tuning of question answering (paper, section 5.3)."""

    label_smoothing: float = 0.1
    """Of the loss of an answer's words."""

    def __post_init__(self) -> None:
        _require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


CAPTION_PROMPT = "a picture of "
"""What a captioner's texts begin with (paper, section 5.2)."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of image-text pairs."""

    path: str
    """A file, folder, glob or list of shards ({000..127}, {a,b}, a::b), or the name of a data set on the hub."""
    format: Literal["auto", "json", "imagefolder", "parquet", "tar", "dataset"] = "auto"
    """`auto` goes by the ending; `json` also reads JSON lines, CSV, and Karpathy's and COCO's files."""
    image_root: str | None = None
    """Folder that relative image paths start from; the annotation file's own folder when not given."""
    image_column: str = "image"
    """Column or key with the image or its path."""
    caption_column: str = "caption"
    """Column or key with the caption or list of captions."""
    split: str | None = None
    """Split to take where the source has several (`a+b`: two); refused where it has none, as parquet and tar."""
    weight: float = 1.0
    """Passes over this source in one epoch; 0.5 shows half of it, a different half each epoch."""
    kind: Literal["human", "web"] = "human"
    """Written by people for the image, or found beside it."""
    allow_truncated: bool = False
    """Use the samples of a tar shard before the byte where it is cut off or damaged, instead of stopping."""

    def __post_init__(self) -> None:
        _check_positive(self.weight, f"weight of source {self.path}")


@dataclass(frozen=True)
class PictureQuestions:
    """Questions about pictures: VQA v2's files, the 2022 release's, easy-VQA's, or a list of rows."""

    path: str
    """The file of questions, .json or .jsonl."""
    annotations: str | None = None
    """The file of answers, where they are not beside the questions (VQA v2)."""
    image_root: str | None = None
    """Folder that image paths start from; the file's own folder when not given."""
    image_name: str | None = None
    """Path of a picture whose number alone is given, such as `val2014/COCO_val2014_{image_id:012d}.jpg`; by the file's
    `data_subtype` when not given."""
    image_column: str = "image"
    """Key with the image's path, in a list."""
    question_column: str = "question"
    """Key with the question, in a list."""
    answer_column: str = "answer"
    """Key with the answer or the list of answers, in a list."""
    id_column: str = "question_id"
    """Key with the question's id, in a list; the row's number where there is none."""
    weight: float = 1.0
    """Passes over this source in one epoch."""
    answer_weight: float | None = None
    """How much the answers to a question count together; 1 when not given, and 0.2 in the release's rows of dataset vg
    (Visual Genome)."""

    def __post_init__(self) -> None:
        _check_positive(self.weight, f"weight of source {self.path}")
        if self.answer_weight is not None:
            _check_positive(self.answer_weight, f"answer_weight of source {self.path}")


@dataclass(frozen=True)
class PictureSentences:
    """Sentences about several pictures: NLVR2's or NLVR's annotations, or a list of {images, sentence, label}."""

    path: str
    """The annotation file, .json or .jsonl."""
    image_root: str | None = None
    """Folder of the pictures, or of images/; the annotation file's own folder when not given."""
    part: Literal["all", "train", "val"] = "all"
    """Which part to take where one file is split in two; no sentence and no set of pictures is in both."""
    held_out: float = 0.2
    """Share of `val` in such a split."""
    weight: float = 1.0
    """Passes over this source in one epoch."""

    def __post_init__(self) -> None:
        _check_positive(self.weight, f"weight of source {self.path}")
        _require(0 < self.held_out < 1, f"held_out of source {self.path} must be in (0, 1), got {self.held_out}")


@dataclass(frozen=True)
class Dialogues:
    """Dialogues about pictures in the format of VisDial v1.0."""

    path: str
    """The file of dialogues, such as visdial_1.0_val.json."""
    image_root: str | None = None
    """Folder of the pictures; the file's own folder when not given."""
    relevance: str | None = None
    """File of dense annotations, such as visdial_1.0_val_dense_annotations.json; without it there is no NDCG."""
    weight: float = 1.0
    """Passes over this source in one epoch."""

    def __post_init__(self) -> None:
        _check_positive(self.weight, f"weight of source {self.path}")


@dataclass(frozen=True)
class DataConfig:
    """What the model is shown."""

    sources: list[SourceConfig] = field(default_factory=list)
    """The sources of a run, mixed by weight."""
    prompt: str = ""
    """Words put before every caption; a model that writes is given them and does not learn to say them."""
    max_words: int = 30
    """Words kept of a caption, the prompt's not counted."""
    max_tokens: int = 30
    """Word pieces kept of a caption, first and last special tokens and the prompt included."""
    crop_scale_min: float = 0.2
    """Smallest share of the picture that a random crop shows (0.5 in fine-tuning); 1 shows the whole picture."""
    flip: float = 0.5
    """Probability of a mirror image."""
    flip_sided_captions: bool = False
    """Mirror also pictures whose caption says left or right (2022: true)."""
    augment_ops: int = 2
    """RandAugment operations drawn per picture; each is applied with probability 0.5."""
    augment_magnitude: int = 7
    """RandAugment strength, 0 to 10 (2022: 5, at which brightness and sharpness do nothing)."""
    workers: int = 2
    """Decoding processes per training process."""
    worker_timeout: float = 120.0
    """Seconds without a batch, and without a worker that computes, after which the run stops."""
    streaming: bool = False
    """Read shards in sequence with a shuffle buffer instead of by index; for sets larger than memory."""
    shuffle_buffer: int = 10000
    """Samples in the shuffle buffer of a streaming run."""
    max_pixels: int = 100_000_000
    """Pictures with more pixels than this are refused from their header, as are sides above 65,535 and 1,000 to 1."""
    max_bad_fraction: float = 0.05
    """Share of unreadable samples above which the run stops."""
    max_unknown: float = 0.01
    """Share of unknown word pieces in a sample of the captions above which the tokenizer is refused."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 3, f"max_tokens must be 3 or more, got {self.max_tokens}")
        _require(self.max_words >= 1, f"max_words must be 1 or more, got {self.max_words}")
        _require(0 < self.crop_scale_min <= 1, f"crop_scale_min must be in (0, 1], got {self.crop_scale_min}")
        _require(0 <= self.flip <= 1, f"flip must be in [0, 1], got {self.flip}")
        _require(self.augment_ops >= 0, f"augment_ops must be 0 or more, got {self.augment_ops}")
        _require(0 <= self.augment_magnitude <= 10, f"augment_magnitude must be 0 to 10, got {self.augment_magnitude}")
        _require(0 <= self.max_bad_fraction <= 1, f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")
        _require(self.workers >= 0, f"workers must be 0 or more, got {self.workers}")
        _require(0 <= self.max_unknown <= 1, f"max_unknown must be in [0, 1], got {self.max_unknown}")
        _require(self.worker_timeout > 0, f"worker_timeout must be positive, got {self.worker_timeout}")
        _require(self.shuffle_buffer >= 1, f"shuffle_buffer must be 1 or more, got {self.shuffle_buffer}")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how safely to train."""

    epochs: float = 20.0
    """Passes over the data; ignored when `steps` is given."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 75
    """Pairs per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Final learning rate."""
    warmup_steps: int = 3000
    """Steps of linear warm-up."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    schedule: Literal["cosine", "epoch_decay", "epoch_cosine", "constant"] = "cosine"
    """After warm-up: cosine by step, or by whole epochs as in 2022 (`epoch_decay` multiplies by `decay` each epoch)."""
    decay: float = 0.9
    """Factor per epoch of `epoch_decay`."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the blocks' matrices: fewer steps for a model that starts from nothing."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    decay_all: bool = False
    """Decay norms, biases, embeddings of position and the temperature too (2022: true)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float | None = 1.0
    """Largest gradient norm (2022: none)."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    compile: bool = False
    """torch.compile the objective."""
    seed: int = 0
    """Everything random is a function of this, the step, the sample and the process."""
    log_every: int = 50
    """Steps between log lines."""
    save_every: int = 1000
    """Steps between resumable checkpoints."""
    keep_checkpoints: int = 2
    """Resumable checkpoints kept."""
    eval_every: int = 0
    """Steps between evaluations; 0 for only at the end."""
    eval_each_epoch: bool = False
    """Evaluate whenever the data has been passed over, too."""
    trackers: list[str] = field(default_factory=list)
    """accelerate trackers: tensorboard, wandb, trackio; metrics.jsonl is always written."""
    skip_nonfinite: int = 0
    """Updates with a non-finite loss or gradient that may be skipped before the run stops."""
    allow_change: bool = False
    """Continue a run although its settings changed."""
    timeout: float = 600.0
    """Seconds after which a process that lost its peers gives up."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"batch_size must be 1 or more, got {self.batch_size}")
        _require(self.accumulate >= 1, f"accumulate must be 1 or more, got {self.accumulate}")
        _require(self.steps is None or self.steps >= 1, f"steps must be 1 or more, got {self.steps}")
        _check_positive(self.epochs, "epochs")
        _require(self.save_every >= 1, f"save_every must be 1 or more, got {self.save_every}")
        _require(self.keep_checkpoints >= 1, f"keep_checkpoints must be 1 or more, got {self.keep_checkpoints}")
        _require(self.log_every >= 1, f"log_every must be 1 or more, got {self.log_every}")
        _require(self.eval_every >= 0, f"eval_every must be 0 or more, got {self.eval_every}")
        _require(self.warmup_steps >= 0, f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        check_rates(self, "lr", "min_lr", "warmup_lr", "weight_decay", "eps")
        _require(0 < self.decay <= 1, f"decay must be in (0, 1], got {self.decay}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}")
        _check_positive(self.timeout, "timeout")
        _require(self.clip is None or self.clip > 0, f"clip must be positive or null, got {self.clip}")


LENGTH_RULES = ("generated", "2022")
"""What counts as the length of a text where beams are compared; `DecodeConfig` says which is which."""
LengthRule = Literal["generated", "2022", 2022]
"""One of these, or the number that YAML makes of a 2022 without quotes; settings have the text."""


def _check_length_rule(settings: Any) -> None:
    rule, rules = str(settings.length_rule), ", ".join(LENGTH_RULES)
    _require(rule in LENGTH_RULES, f"length_rule must be one of {rules}, got {settings.length_rule!r}")
    object.__setattr__(settings, "length_rule", rule)


@dataclass(frozen=True)
class DecodeConfig:
    """How a text is written. Lengths count tokens: [DEC], the prompt and [SEP] included."""

    method: Literal["beam", "nucleus"] = "beam"
    """`beam` keeps the likeliest beginnings (with `beams` 1 it is greedy), `nucleus` samples."""
    beams: int = 3
    """Beginnings kept by beam search."""
    num: int = 1
    """Texts per image: the best of the beams, or independent samples."""
    max_length: int = 20
    """Longest text."""
    min_length: int = 5
    """Shortest text to which [SEP] may be added."""
    length_penalty: float = 1.0
    """Texts are compared by the sum of their words' log-probabilities over their length to this power."""
    length_rule: LengthRule = "generated"
    """What counts as length: `generated` words with [SEP], as in today's transformers; `2022` also the prompt, and not
    [SEP], as in that of the original."""
    repetition_penalty: float = 1.0
    """Above 1 makes words that stand there already less likely."""
    top_p: float = 0.9
    """Nucleus: the likeliest words that together reach this probability are drawn from."""
    top_k: int = 0
    """Nucleus: words drawn from at most; 0 for any number."""
    temperature: float = 1.0
    """Nucleus: above 1 evens out, below 1 sharpens."""
    seed: int = 0
    """Nucleus: a sample is a function of this, its key and its number."""

    def __post_init__(self) -> None:
        _require(self.beams >= 1, f"beams must be 1 or more, got {self.beams}")
        _require(self.num >= 1, f"num must be 1 or more, got {self.num}")
        fits = self.method != "beam" or self.num <= self.beams
        _require(fits, f"num {self.num} is more than the {self.beams} beams it is chosen from")
        _require(self.max_length >= 2, f"max_length must be 2 or more, got {self.max_length}")
        _require(self.min_length >= 0, f"min_length must be 0 or more, got {self.min_length}")
        ordered = self.min_length <= self.max_length
        _require(ordered, f"min_length {self.min_length} is more than max_length {self.max_length}")
        _check_length_rule(self)
        _check_positive(self.repetition_penalty, "repetition_penalty")
        finite = abs(self.length_penalty) < float("inf")
        _require(finite, f"length_penalty must be a number, got {self.length_penalty}")
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _require(self.top_k >= 0, f"top_k must be 0 or more, got {self.top_k}")
        _check_positive(self.temperature, "temperature")


DECODE_PRESETS: dict[str, DecodeConfig] = {
    "greedy": DecodeConfig(beams=1),
    "caption_2022": DecodeConfig(beams=3, max_length=20, min_length=5, length_rule="2022"),
    "nucleus": DecodeConfig(method="nucleus", top_p=0.9),
    # The paper says nucleus sampling with p 0.9; the release's library and code added the other two.
    "capfilt_2022": DecodeConfig(method="nucleus", top_p=0.9, top_k=50, repetition_penalty=1.1),
}


QUESTION_WORDS, QUESTION_TOKENS = 50, 35
"""Words and word pieces kept of a question, as in the original."""


@dataclass(frozen=True)
class AnswerConfig:
    """How a question is answered: the best of some candidates, or any words."""

    k: int = 128
    """Candidates that are weighed in full: those that begin most likely."""
    smoothing: float = 0.0
    """Share of a candidate's score that is the mean over all words, as in the training loss (2022: 0.1)."""
    beams: int = 3
    """Beginnings kept where words are searched, not chosen."""
    max_length: int = 10
    """Longest answer that is searched; tokens, [DEC] and [SEP] included."""
    length_rule: LengthRule = "generated"
    """What counts as an answer's length where words are searched: `generated` words with [SEP]; `2022` [DEC] but not
    [SEP]."""

    def __post_init__(self) -> None:
        _require(self.k >= 1, f"k must be 1 or more, got {self.k}")
        _require(0 <= self.smoothing < 1, f"smoothing must be in [0, 1), got {self.smoothing}")
        _check_length_rule(self)
        self.decode()

    def decode(self) -> DecodeConfig:
        """How words are searched."""
        return DecodeConfig(beams=self.beams, max_length=self.max_length, min_length=0, length_rule=self.length_rule)
