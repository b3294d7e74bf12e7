"""Shapes of the two transformers, the ids of special tokens, and what training adds to both."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field

from blip.settings import DEPTH, HEADS, ID, LATER, SHARE, SIDE, WIDTH, between, check_fields, check_fractions, require


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder: any timm ViT by name; `None` keeps the value that the name implies."""

    model: str = "vit_base_patch16_224"
    """Name of a timm architecture, without a tag of weights."""
    image_size: int = field(default=224, metadata=SIDE)
    """Side of the square input, pixels."""
    patch_size: int | None = field(default=None, metadata=SIDE)
    """Side of a patch, pixels."""
    width: int | None = field(default=None, metadata=WIDTH)
    """Width of a token."""
    depth: int | None = field(default=None, metadata=DEPTH)
    """Number of blocks."""
    heads: int | None = field(default=None, metadata=HEADS)
    """Number of attention heads."""
    init_gain: float | None = field(default=None, metadata=between(0, 1000))
    """Deviation of initial weights times sqrt(inputs), with sinusoidal positions; `None`: timm's, slow if narrow."""
    norm_eps: float | None = field(default=None, metadata=LATER | SHARE)
    """Epsilon of layer normalisation; 1e-6 in the ViTs of the 2022 release."""
    hidden: int | None = field(default=None, metadata=LATER | between(1, 1 << 17))
    """Width inside the feed-forward."""

    def __post_init__(self) -> None:
        check_fields(self, "vision.")
        # timm downloads names that contain an address, and a model directory must not cause downloads.
        require(
            re.fullmatch(r"[A-Za-z0-9_]{1,100}", self.model) is not None,
            f"vision.model must be the name of a timm architecture, such as vit_base_patch16_224, not a repository, an "
            f"address, a path or the name of weights; got {reprlib.repr(self.model)}",
        )
        whole = None in (self.width, self.heads) or self.width % self.heads == 0
        require(whole, f"vision.width {self.width} is not a multiple of vision.heads {self.heads}")


@dataclass(frozen=True)
class TextConfig:
    """The text transformer (MED), BERT-shaped, and the ids of the special tokens that its weights were trained with."""

    vocab_size: int = field(default=30524, metadata=between(1, 1 << 24))
    """Number of word pieces, [DEC] and [ENC] included."""
    width: int = field(default=768, metadata=WIDTH)
    """Width of a token."""
    layers: int = field(default=12, metadata=DEPTH)
    """Number of blocks."""
    heads: int = field(default=12, metadata=HEADS)
    """Number of attention heads."""
    hidden: int = field(default=3072, metadata=between(1, 1 << 17))
    """Width inside the feed-forward."""
    max_positions: int = field(default=512, metadata=between(2, 1 << 20))
    """Longest text in tokens."""
    norm_eps: float = field(default=1e-12, metadata=SHARE)
    """Epsilon of layer normalisation."""
    init_std: float = field(default=0.02, metadata=between(0, 1000))
    """Standard deviation of initial weights."""
    pad_id: int = field(default=0, metadata=ID)
    """Id of [PAD]."""
    cls_id: int = field(default=101, metadata=ID)
    """Id of [CLS], first token of a text on its own."""
    sep_id: int = field(default=102, metadata=ID)
    """Id of [SEP], last token of every text."""
    dec_id: int = field(default=30522, metadata=ID)
    """Id of [DEC], first token of a text to be generated."""
    enc_id: int = field(default=30523, metadata=ID)
    """Id of [ENC], first token of a text to be matched with an image."""

    def __post_init__(self) -> None:
        check_fields(self, "text.")
        require(self.width % self.heads == 0, f"text width {self.width} is not a multiple of {self.heads} heads")
        for name in ("pad_id", "cls_id", "sep_id", "dec_id", "enc_id"):
            value = getattr(self, name)
            require(value < self.vocab_size, f"text.{name} {value} is outside the vocabulary of {self.vocab_size}")


@dataclass(frozen=True)
class TrainingOptions:
    """How a model computes while it is trained: a setting of a run, not saved with the model."""

    drop_path: float = field(default=0.0, metadata=SHARE)
    """Probability of stochastic depth at the last block of the image encoder."""
    patch_drop: float = field(default=0.0, metadata=SHARE)
    """Share of patches dropped (FLIP), which trades accuracy for speed."""
    checkpoint: bool = False
    """Recompute the image encoder's blocks in the backward pass to save memory."""
    dropout: float = field(default=0.0, metadata=SHARE)
    """Dropout of the text transformer's embeddings and block outputs."""
    attention_dropout: float = field(default=0.0, metadata=SHARE)
    """Dropout of the text transformer's attention probabilities."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_fractions(self, "drop_path", "patch_drop")
