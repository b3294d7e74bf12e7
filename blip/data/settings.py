"""Settings of a run's data: its sources, and how it is prepared for the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip.settings import check_positive, require


@dataclass(frozen=True)
class SourceConfig:
    """One source of image-text pairs."""

    path: str
    """A file, folder, glob or list of shards ({000..127}, {a,b}, a::b), or the name of a data set on the hub."""
    format: Literal["auto", "json", "imagefolder", "parquet", "tar", "dataset"] = "auto"
    """Format of the source. `auto` goes by extension; `json` includes JSON lines, CSV, Karpathy's and COCO's files."""
    image_root: str | None = None
    """Folder that relative image paths start from; the annotation file's own folder by default."""
    image_column: str = "image"
    """Column or key with the image or its path."""
    caption_column: str = "caption"
    """Column or key with the caption or list of captions."""
    split: str | None = None
    """Split to use if the source has several (`a+b` for two); refused if it has none, as with parquet and tar."""
    weight: float = 1.0
    """Passes over this source per epoch; 0.5 uses one half of it per epoch, alternating."""
    kind: Literal["human", "web"] = "human"
    """Origin of the captions: written by humans for the image, or found with it on the web."""
    allow_truncated: bool = False
    """Use the samples of a truncated or damaged tar shard that precede the damage, instead of stopping."""

    def __post_init__(self) -> None:
        check_positive(self.weight, f"weight of source {self.path}")


@dataclass(frozen=True)
class ImageQuestions:
    """Questions about images: VQA v2's files, the 2022 release's, easy-VQA's, or a list of rows."""

    path: str
    """File of questions, .json or .jsonl."""
    annotations: str | None = None
    """File of answers, if they are not in the file of questions (VQA v2)."""
    image_root: str | None = None
    """Folder that image paths start from; the file's own folder by default."""
    image_name: str | None = None
    """Path of an image whose number alone is given, such as `val2014/COCO_val2014_{image_id:012d}.jpg`; by the file's
    `data_subtype` when not given."""
    image_column: str = "image"
    """Key with the image's path, in a list."""
    question_column: str = "question"
    """Key with the question, in a list."""
    answer_column: str = "answer"
    """Key with the answer or the list of answers, in a list."""
    id_column: str = "question_id"
    """Key with the question's id, in a list; the row's number if there is none."""
    weight: float = 1.0
    """Passes over this source in one epoch."""
    answer_weight: float | None = None
    """Total weight of the answers to a question; 1 when not given, and 0.2 in the release's rows of dataset vg
    (Visual Genome)."""

    def __post_init__(self) -> None:
        check_positive(self.weight, f"weight of source {self.path}")
        if self.answer_weight is not None:
            check_positive(self.answer_weight, f"answer_weight of source {self.path}")


@dataclass(frozen=True)
class ImageSentences:
    """Sentences about several images: NLVR2's or NLVR's annotations, or a list of {images, sentence, label}."""

    path: str
    """Annotation file, .json or .jsonl."""
    image_root: str | None = None
    """Folder of the images, or of images/; the annotation file's own folder by default."""
    part: Literal["all", "train", "val"] = "all"
    """Part to use if one file is split in two; no sentence and no set of images is in both."""
    held_out: float = 0.2
    """Share of `val` in such a split."""
    weight: float = 1.0
    """Passes over this source in one epoch."""

    def __post_init__(self) -> None:
        check_positive(self.weight, f"weight of source {self.path}")
        require(0 < self.held_out < 1, f"held_out of source {self.path} must be in (0, 1), got {self.held_out}")


@dataclass(frozen=True)
class Dialogues:
    """Dialogues about images in the format of VisDial v1.0."""

    path: str
    """File of dialogues, such as visdial_1.0_val.json."""
    image_root: str | None = None
    """Folder of the images; the file's own folder by default."""
    relevance: str | None = None
    """File of dense annotations, such as visdial_1.0_val_dense_annotations.json; without it NDCG is not computed."""
    weight: float = 1.0
    """Passes over this source in one epoch."""

    def __post_init__(self) -> None:
        check_positive(self.weight, f"weight of source {self.path}")


@dataclass(frozen=True)
class DataConfig:
    """Settings of the training data."""

    sources: list[SourceConfig] = field(default_factory=list)
    """The sources of a run, mixed by weight."""
    prompt: str = ""
    """Prompt put before every caption, and excluded from the loss."""
    max_words: int = 30
    """Most words of a caption, without the prompt; the rest is cut off."""
    max_tokens: int = 30
    """Most word pieces of a caption, with the prompt and the first and last special tokens; the rest is cut off."""
    crop_scale_min: float = 0.2
    """Smallest share of the image's area in a random crop (0.5 in fine-tuning); 1 keeps the whole image."""
    flip: float = 0.5
    """Probability of mirroring an image."""
    flip_sided_captions: bool = False
    """Also mirror images whose caption says left or right (2022: true)."""
    augment_ops: int = 2
    """RandAugment operations drawn per image; each is applied with probability 0.5."""
    augment_magnitude: int = 7
    """RandAugment strength, 0 to 10 (2022: 5, at which brightness and sharpness have no effect)."""
    workers: int = 2
    """Number of data workers (decoding processes) per training process."""
    worker_timeout: float = 120.0
    """Seconds without a batch, and without a computing worker, after which the run stops."""
    remote: bool = False
    """Allow addresses (s3://, gs://, hf://, https://) as sources, held-out ones included; they are read in place."""
    streaming: bool = False
    """Read shards in sequence with a shuffle buffer instead of by index; for sets larger than memory."""
    shuffle_buffer: int = 10000
    """Number of samples in the shuffle buffer of a streaming run."""
    max_pixels: int = 100_000_000
    """Most pixels of an image; larger ones, sides above 65,535 and aspect ratios above 1,000 are refused undecoded."""
    max_bad_fraction: float = 0.05
    """Share of unreadable samples above which the run stops."""
    max_unknown: float = 0.01
    """Share of unknown word pieces in some captions above which the tokenizer is refused."""

    def __post_init__(self) -> None:
        require(self.max_tokens >= 3, f"max_tokens must be 3 or more, got {self.max_tokens}")
        require(self.max_words >= 1, f"max_words must be 1 or more, got {self.max_words}")
        require(0 < self.crop_scale_min <= 1, f"crop_scale_min must be in (0, 1], got {self.crop_scale_min}")
        require(0 <= self.flip <= 1, f"flip must be in [0, 1], got {self.flip}")
        require(self.augment_ops >= 0, f"augment_ops must be 0 or more, got {self.augment_ops}")
        require(0 <= self.augment_magnitude <= 10, f"augment_magnitude must be 0 to 10, got {self.augment_magnitude}")
        require(0 <= self.max_bad_fraction <= 1, f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")
        require(self.workers >= 0, f"workers must be 0 or more, got {self.workers}")
        require(0 <= self.max_unknown <= 1, f"max_unknown must be in [0, 1], got {self.max_unknown}")
        require(self.worker_timeout > 0, f"worker_timeout must be positive, got {self.worker_timeout}")
        require(self.shuffle_buffer >= 1, f"shuffle_buffer must be 1 or more, got {self.shuffle_buffer}")
