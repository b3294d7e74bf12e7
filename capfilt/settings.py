"""The settings that decide results, and the exit statuses of the command."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from blip.data.settings import DataConfig
from blip.options import option
from capfilt.select.rules import IMAGE_RULES, PRESETS

if TYPE_CHECKING:
    from blip.inference.settings import DecodeConfig

DONE, WRONG, FAILED_PARTS, MISMATCH, INTERRUPTED = 0, 2, 3, 4, 130
"""Exit statuses; WRONG (wrong use) also covers damaged sources without --allow-damaged."""


def at_least(least: int, **values: int | None) -> None:
    """Raise ValueError for the first value that is not None and below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")


@dataclass(frozen=True)
class ScoreConfig:
    """How rows are scored: all settings that change results, and only those. All are in the fingerprint."""

    scorer: Literal["blip", "fake"] = "blip"
    """Scorer: `blip`, or `fake`, which derives scores from hashes, for rehearsals and tests."""
    captioner: str | None = None
    """Model directory or hub name of the captioner; without it there are no synthetic texts."""
    filter: str | None = None
    """Model directory or hub name of the filter."""
    image_size: int | None = None
    """Side of the model's input, pixels (default: the models' own)."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", was="dtype")
    """Numeric precision of the models. auto is decided when the job is planned: bfloat16 on a GPU that has it, else
    float32. In bfloat16 a text or score may depend on the rest of the batch."""
    decode: str = "capfilt_2022"
    """Preset of blip.inference.settings.DECODE_PRESETS with which captions are generated."""
    captions: int = 1
    """Synthetic texts per image."""
    max_length: int | None = None
    """Longest synthetic text, word pieces with the prompt (default: the preset's)."""
    prompt: str = "a picture of "
    """Prompt with which the captioner was fine-tuned; it is removed from the generated text."""
    itm_token: Literal["enc", "cls"] = "enc"
    """First token of a text to be matched; `cls` only to compare with releases that forgot [ENC]."""
    max_words: int = 30
    """Most words of a text in scoring; the rest is cut off."""
    max_tokens: int = 35
    """Most word pieces of a text in scoring, special tokens included; the rest is cut off."""
    max_pixels: int = DataConfig.max_pixels
    """Images with more pixels than this are not decoded."""
    lenient: bool = False
    """Decode truncated images as far as possible and flag them, instead of refusing them (2022: true)."""
    draft: bool = False
    """Decode large JPEGs at a fraction of their size: twice as fast, slightly different pixels."""
    rules_first: str | None = None
    """Preset of rules on image files that exclude rows before the models run: align, datacomp-basic or laion."""
    seed: int = 0
    """Random seed for caption sampling."""

    def __post_init__(self) -> None:
        at_least(1, captions=self.captions, max_words=self.max_words, max_pixels=self.max_pixels)
        at_least(3, max_tokens=self.max_tokens)
        presets = [name for name, rules in PRESETS.items() if rules & IMAGE_RULES.keys()]
        if self.rules_first and self.rules_first not in presets:
            raise ValueError(f"unknown rules_first {self.rules_first!r}: expected one of {', '.join(presets)}")
        if self.scorer == "blip" and not self.filter:
            raise ValueError("give --filter (and --captioner, for synthetic texts), or --scorer fake to rehearse")


FIRST_CALLED = {"precision": "dtype"}
"""Names in job.json and in the fingerprint of ScoreConfig's fields; they never change."""


def to_record(config: ScoreConfig) -> dict[str, Any]:
    """Return the settings as a job records them."""
    return {FIRST_CALLED.get(name, name): value for name, value in dataclasses.asdict(config).items()}


def of_record(values: dict[str, Any]) -> dict[str, Any]:
    """Convert a job's record to the current field names."""
    now = {first: name for name, first in FIRST_CALLED.items()}
    return {now.get(name, name): value for name, value in values.items()}


def decided(config: ScoreConfig, planned: ScoreConfig | None = None, device: Any = None) -> ScoreConfig:
    """Replace the precision `auto`: by that of the plan if there is one, else by the device's.

    The device is this process's own unless given.
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
    """Folder that image paths start from and must stay in (default: the list's own folder)."""
    split: str | None = None
    """Split of an input that has several (`a+b`: two); refused for inputs without splits, such as parquet and tar."""


@dataclass(frozen=True)
class ScoreOptions:
    """Settings of the work, none of which changes a result."""

    batch: int | None = option(None, was="batch-size")
    """Images per batch of the models (default: by device)."""
    decode_workers: int | None = None
    """Decoding processes; 0 decodes in this one (default: by the number of cores)."""
    decode_timeout: float = 60.0
    """Seconds after which decoding an image is given up."""
    limit: int | None = None
    """Score about this many rows, taken from all over the input, and stop; a later run continues with the rest."""
    max_error_rate: float = 0.2
    """Stop when more than this share of the first rows cannot be used."""
    allow_damaged: bool = False
    """Exit 0 even if source files are damaged."""
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
    """How a threshold is calibrated."""

    method: Literal["audit", "reference", "null"] = "audit"
    """audit: label a sheet of this run's own texts (recommended); reference: a clean set of pairs; null: shuffled
    captions, which only show whether the filter is broken."""
    count: int = 200
    """Most texts on the audit's sheet; 2,000 pairs are good for `null`, some hundred images for `reference`."""
    labels: str | None = None
    """Labels to read, a filled-in labels.csv or a project of `export --format labelstudio` that Label Studio exported
    as JSON: audit then estimates precision and recall."""
    reference: str | None = None
    """Clean pairs for `reference`: any input that `plan` takes, e.g. a COCO or Flickr validation list."""
    target: float = 0.9
    """Precision that the lower end of the confidence interval should reach."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; `auto` is a GPU if there is one."""
    decode_workers: int | None = None
    """Decoding processes."""

    def __post_init__(self) -> None:
        at_least(10, count=self.count)
        if not 0 <= self.target <= 1:
            raise ValueError(f"target is a precision, 0 to 1, got {self.target}")
        if self.method == "reference" and not self.reference:
            raise ValueError("method reference needs --reference with clean pairs")
        if self.reference and self.method != "reference":
            raise ValueError(f"--reference is for --method reference, got --method {self.method}")
        if self.labels and self.method != "audit":
            raise ValueError(f"--labels is for --method audit, got --method {self.method}")


@dataclass(frozen=True)
class ReportOptions:
    """What the report page shows."""

    select: str | None = None
    """Name of a selection (default: every text with P(match) of at least 0.5)."""
    per_group: int = 12
    """Images per group."""
    no_blur: bool = False
    """Show images at once instead of blurring them until a click (nobody has reviewed them yet)."""
    to: str | None = None
    """Folder to write the page to (default: report/NAME in the run)."""
    title: str | None = None
    """Title of the page (default: how many images came in and how many texts are kept)."""


def resolve(config: ScoreConfig) -> dict[str, Any]:
    """Replace names of models and presets by hashes and numbers, for the fingerprint.

    FileNotFoundError or ValueError if a model is missing, or is made for another task.
    """
    from capfilt.schema import VERSION  # imports pyarrow, which --help does not need

    values = to_record(config)
    values["schema"] = VERSION
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
    """Return the decoding preset with the number of captions, their length and the seed. ValueError if they clash."""
    from blip.inference.settings import DECODE_PRESETS

    if config.decode not in DECODE_PRESETS:
        raise ValueError(f"decode {config.decode!r} is not one of {', '.join(DECODE_PRESETS)}")
    changes = {"num": config.captions, "seed": config.seed}
    if config.max_length is not None:
        changes["max_length"] = config.max_length
    return dataclasses.replace(DECODE_PRESETS[config.decode], **changes)


def decode_record(config: ScoreConfig) -> dict[str, Any]:
    """Return the decoding settings as plans and parts record them; the length rule only where it is not `generated`.

    `generated` was once the only rule and was not recorded; older jobs so keep their fingerprint.
    """
    values = dataclasses.asdict(decode_settings(config))
    if values["length_rule"] == "generated":
        del values["length_rule"]
    return values


def has_gpu() -> bool:
    """Tell whether there is an NVIDIA device, without importing torch."""
    return os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
