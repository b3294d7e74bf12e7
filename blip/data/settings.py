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
    """Written by a human for the image, or found beside it."""
    allow_truncated: bool = False
    """Use the samples of a tar shard before the byte where it is cut off or damaged, instead of stopping."""

    def __post_init__(self) -> None:
        check_positive(self.weight, f"weight of source {self.path}")


@dataclass(frozen=True)
class ImageQuestions:
    """Questions about images: VQA v2's files, the 2022 release's, easy-VQA's, or a list of rows."""

    path: str
    """The file of questions, .json or .jsonl."""
    annotations: str | None = None
    """The file of answers, where they are not beside the questions (VQA v2)."""
    image_root: str | None = None
    """Folder that image paths start from; the file's own folder when not given."""
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
    """Key with the question's id, in a list; the row's number where there is none."""
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
    """The annotation file, .json or .jsonl."""
    image_root: str | None = None
    """Folder of the images, or of images/; the annotation file's own folder when not given."""
    part: Literal["all", "train", "val"] = "all"
    """Part to take where one file is split in two; no sentence and no set of images is in both."""
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
    """The file of dialogues, such as visdial_1.0_val.json."""
    image_root: str | None = None
    """Folder of the images; the file's own folder when not given."""
    relevance: str | None = None
    """File of dense annotations, such as visdial_1.0_val_dense_annotations.json; without it there is no NDCG."""
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
    """Words put before every caption; a decoder is given them and does not learn to predict them."""
    max_words: int = 30
    """Words kept of a caption, the prompt's not counted."""
    max_tokens: int = 30
    """Word pieces kept of a caption, first and last special tokens and the prompt included."""
    crop_scale_min: float = 0.2
    """Smallest share of the image that a random crop shows (0.5 in fine-tuning); 1 shows the whole image."""
    flip: float = 0.5
    """Probability of a mirror image."""
    flip_sided_captions: bool = False
    """Mirror also images whose caption says left or right (2022: true)."""
    augment_ops: int = 2
    """RandAugment operations drawn per image; each is applied with probability 0.5."""
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
    """Images with more pixels than this are refused from their header, as are sides above 65,535 and 1,000 to 1."""
    max_bad_fraction: float = 0.05
    """Share of unreadable samples above which the run stops."""
    max_unknown: float = 0.01
    """Share of unknown word pieces in a sample of the captions above which the tokenizer is refused."""

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
