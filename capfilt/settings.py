"""The settings that decide results, and the exit statuses of the command."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from blip.data.settings import DataConfig
from blip.options import option
from capfilt import schema
from capfilt.select.rules import IMAGE_RULES, PRESETS

if TYPE_CHECKING:
    from blip.inference.settings import DecodeConfig

DONE, WRONG, FAILED_PARTS, MISMATCH, INTERRUPTED = 0, 2, 3, 4, 130
"""Exit statuses; WRONG is also for damaged sources that were not allowed."""


def at_least(least: int, **values: int | None) -> None:
    """ValueError that names the first value that is given and below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")


@dataclass(frozen=True)
class ScoreConfig:
    """How rows are scored. All of it is in the fingerprint; nothing that does not change results is here."""

    scorer: Literal["blip", "fake"] = "blip"
    """`fake` makes scores out of hashes: for rehearsals and tests."""
    captioner: str | None = None
    """Model directory or hub name of the captioner; none writes no synthetic texts."""
    filter: str | None = None
    """Model directory or hub name of the filter."""
    image_size: int | None = None
    """Side of the model's input, pixels; the models' own when not given."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", was="dtype")
    """Number format of the models. auto is decided when the job is planned: bfloat16 on a GPU that has it, else
    float32. In bfloat16 a text or score may depend on what else is in the batch."""
    decode: str = "capfilt_2022"
    """Preset of blip.inference.settings.DECODE_PRESETS by which captions are written."""
    captions: int = 1
    """Synthetic texts per image."""
    max_length: int | None = None
    """Longest synthetic text, word pieces with the prompt; the preset's when not given."""
    prompt: str = "a picture of "
    """Beginning of every caption, as the captioner was fine-tuned; it is taken off the text again."""
    itm_token: Literal["enc", "cls"] = "enc"
    """First token of a text to be matched; `cls` only to compare with releases that forgot [ENC]."""
    max_words: int = 30
    """Words kept of a text before it is scored."""
    max_tokens: int = 35
    """Word pieces kept of a text before it is scored, special ones included."""
    max_pixels: int = DataConfig.max_pixels
    """Images with more pixels than this are not decoded."""
    lenient: bool = False
    """Decode truncated images as far as they go, and flag them, instead of refusing them (2022: true)."""
    draft: bool = False
    """Decode large JPEGs at a fraction of their size: twice as fast, slightly other pixels."""
    rules_first: str | None = None
    """Preset of rules on the image file that decide before the models run: align, datacomp-basic or laion."""
    seed: int = 0
    """Random seed of the captions."""

    def __post_init__(self) -> None:
        at_least(1, captions=self.captions, max_words=self.max_words, max_pixels=self.max_pixels)
        at_least(3, max_tokens=self.max_tokens)
        presets = [name for name, rules in PRESETS.items() if rules & IMAGE_RULES.keys()]
        if self.rules_first and self.rules_first not in presets:
            raise ValueError(f"rules_first {self.rules_first!r} is none of {', '.join(presets)}")
        if self.scorer == "blip" and not self.filter:
            raise ValueError("give --filter (and --captioner, for synthetic texts), or --scorer fake to rehearse")


FIRST_CALLED = {"precision": "dtype"}
"""Settings of ScoreConfig -> their names in job.json and in the fingerprint, which stay what they were first."""


def to_record(config: ScoreConfig) -> dict[str, Any]:
    """Settings as a job records them."""
    return {FIRST_CALLED.get(name, name): value for name, value in dataclasses.asdict(config).items()}


def of_record(values: dict[str, Any]) -> dict[str, Any]:
    """What a job records, under the names of today."""
    now = {first: name for name, first in FIRST_CALLED.items()}
    return {now.get(name, name): value for name, value in values.items()}


def decided(config: ScoreConfig, planned: ScoreConfig | None = None, device: Any = None) -> ScoreConfig:
    """The settings with a number format in place of `auto`: that of the plan if there is one, else of the device.

    The device is this process's own when it is not given.
    """
    if config.precision != "auto":
        return config
    precision = planned.precision if planned else "float32"
    if planned is None and config.scorer == "blip":
        from blip.dist import own_device
        from blip.train.precision import multiplies_bfloat16

        device = device or own_device()
        precision = "bfloat16" if device.type == "cuda" and multiplies_bfloat16(device) else "float32"
    return dataclasses.replace(config, precision=precision)


@dataclass(frozen=True)
class ReadConfig:
    """How the input is read."""

    inputs: list[str] = field(default_factory=list)
    """Files, folders, globs, lists like {000..331}.tar, {a,b}.tar or a.tar::b.tar, or hf:NAME on the hub."""
    image_column: str = "image"
    """Column or key with the image or its path."""
    caption_column: str = "caption"
    """Column or key with the text or list of texts."""
    image_root: str | None = None
    """Folder that image paths start from and stay in; the list's own folder when not given."""
    split: str | None = None
    """Split to take where the input has several (`a+b`: two); refused where it has none, as parquet and tar."""


@dataclass(frozen=True)
class ScoreOptions:
    """How the work is done. None of it changes a result."""

    batch: int | None = option(None, was="batch-size")
    """Images that the models see at once; by device when not given."""
    decode_workers: int | None = None
    """Decoding processes; 0 decodes in this one. By the number of cores when not given."""
    decode_timeout: float = 60.0
    """Seconds after which an image that will not be decoded is given up."""
    limit: int | None = None
    """Score about so many rows, taken from all over the input, and stop; a later run continues with the rest."""
    max_error_rate: float = 0.2
    """Stop when more than this share of the first rows cannot be used."""
    allow_damaged: bool = False
    """Damaged source files are no reason for exit status 2."""
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, limit=self.limit)
        at_least(0, decode_workers=self.decode_workers)
        if not self.decode_timeout > 0:
            raise ValueError(f"decode_timeout must be more than 0 seconds, got {self.decode_timeout}")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"max_error_rate is a share of rows, 0 to 1, got {self.max_error_rate}")


@dataclass(frozen=True)
class CalibrateOptions:
    """How a threshold is looked for."""

    method: Literal["audit", "reference", "null"] = "audit"
    """audit: label a sheet of this run's own texts (recommended); reference: a clean set of pairs; null: shuffled
    captions, which only show whether the filter is broken."""
    count: int = 200
    """Texts on the audit's sheet, at most; 2,000 pairs are good for `null`, some hundred images for `reference`."""
    labels: str | None = None
    """A labelled sheet to read: audit then estimates precision and recall."""
    reference: str | None = None
    """Clean pairs for `reference`: any input that `plan` takes as it is, e.g. a COCO or Flickr validation list."""
    target: float = 0.9
    """Precision that the lower end of the interval should reach."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; `auto` is a GPU if there is one."""
    decode_workers: int | None = None
    """Decoding processes."""

    def __post_init__(self) -> None:
        at_least(10, count=self.count)
        if not 0 <= self.target <= 1:
            raise ValueError(f"target is a precision, 0 to 1, got {self.target}")
        if self.method == "reference" and not self.reference:
            raise ValueError("method reference needs --reference with clean pairs")


@dataclass(frozen=True)
class ReportOptions:
    """What the page shows."""

    select: str | None = None
    """Name of a selection; every text with P(match) of at least 0.5 when not given."""
    per_group: int = 12
    """Images of each group."""
    no_blur: bool = False
    """Show images at once; they are blurred until pointed at, for nobody has looked at them yet."""
    to: str | None = None
    """Where to write the page: report/NAME in the run when not given."""


def resolve(config: ScoreConfig) -> dict[str, Any]:
    """The settings with the models' hashes and the preset's numbers in place of their names: what is fingerprinted.

    FileNotFoundError or ValueError if a model is not there, or is one for something else.
    """
    values = to_record(config)
    values["schema"] = schema.VERSION
    if config.scorer == "blip":
        from blip.checkpoints.checkpoint import check_kind
        from capfilt.store.identity import model_identity

        for role in ("captioner", "filter"):
            if values[role]:
                check_kind(values[role])
            values[role] = model_identity(values[role]) if values[role] else None
        values["decode"] = {"preset": config.decode, **decode_record(config)}
    return values


def decode_settings(config: ScoreConfig) -> DecodeConfig:
    """The decoding preset with the number of captions, their length and the seed. ValueError if they do not fit."""
    from blip.inference.settings import DECODE_PRESETS

    if config.decode not in DECODE_PRESETS:
        raise ValueError(f"decode {config.decode!r} is not one of {', '.join(DECODE_PRESETS)}")
    changes = {"num": config.captions, "seed": config.seed}
    if config.max_length is not None:
        changes["max_length"] = config.max_length
    return dataclasses.replace(DECODE_PRESETS[config.decode], **changes)


def decode_record(config: ScoreConfig) -> dict[str, Any]:
    """The decoding as plans and parts say it; the length rule only where it is not `generated`.

    There was no other before it could be chosen: so a job that was planned then goes on with the same fingerprint.
    """
    values = dataclasses.asdict(decode_settings(config))
    if values["length_rule"] == "generated":
        del values["length_rule"]
    return values


def has_gpu() -> bool:
    """Whether there is an NVIDIA device, without importing torch."""
    return os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
