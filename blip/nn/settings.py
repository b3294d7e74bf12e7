"""Shapes of the two transformers, and the ids of special tokens."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field

from blip.settings import DEPTH, HEADS, ID, LATER, SHARE, SIDE, WIDTH, between, check_fields, require


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder: any timm ViT by name; `None` keeps the value that the name implies."""

    model: str = "vit_base_patch16_224"
    """Name of an architecture of timm, without the name of weights."""
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
    drop_path: float = field(default=0.0, metadata=SHARE)
    """Stochastic depth, probability at the last block."""
    patch_drop: float = field(default=0.0, metadata=SHARE)
    """Share of patches left out in training (FLIP); an approximation that trades accuracy for speed."""
    checkpoint: bool = False
    """Recompute blocks in the backward pass to save memory."""
    init_gain: float | None = field(default=None, metadata=between(0, 1000))
    """Deviation of first weights times sqrt(inputs), and positions as waves; `None` is timm's way, slow if narrow."""
    norm_eps: float | None = field(default=None, metadata=LATER | SHARE)
    """Epsilon of layer normalisation; 1e-6 in the ViTs of the 2022 release."""
    hidden: int | None = field(default=None, metadata=LATER | between(1, 1 << 17))
    """Width inside the feed-forward."""

    def __post_init__(self) -> None:
        check_fields(self, "vision.")
        # timm would fetch what a name with a place in it says, and a model directory must not send anyone anywhere.
        require(
            re.fullmatch(r"[A-Za-z0-9_]{1,100}", self.model) is not None,
            f"vision.model must be the name of an architecture of timm, such as vit_base_patch16_224, got "
            f"{reprlib.repr(self.model)}: a repository, an address, a path or the name of weights is not taken",
        )
        require(self.drop_path < 1, f"drop_path must be in [0, 1), got {self.drop_path}")
        require(self.patch_drop < 1, f"patch_drop must be in [0, 1), got {self.patch_drop}")
        whole = None in (self.width, self.heads) or self.width % self.heads == 0
        require(whole, f"vision.width {self.width} is not a multiple of vision.heads {self.heads}")


@dataclass(frozen=True)
class TextConfig:
    """The text transformer (MED), BERT-shaped, and the ids of the special tokens that its weights were trained with."""

    vocab_size: int = field(default=30524, metadata=between(1, 1 << 24))
    """Word pieces, [DEC] and [ENC] included."""
    width: int = field(default=768, metadata=WIDTH)
    """Width of a token."""
    layers: int = field(default=12, metadata=DEPTH)
    """Number of blocks."""
    heads: int = field(default=12, metadata=HEADS)
    """Number of attention heads."""
    hidden: int = field(default=3072, metadata=between(1, 1 << 17))
    """Width inside the feed-forward."""
    max_positions: int = field(default=512, metadata=between(2, 1 << 20))
    """Longest text, tokens."""
    dropout: float = field(default=0.1, metadata=SHARE)
    """Dropout of embeddings and block outputs."""
    attention_dropout: float = field(default=0.1, metadata=SHARE)
    """Dropout of attention probabilities."""
    norm_eps: float = field(default=1e-12, metadata=SHARE)
    """Epsilon of layer normalisation."""
    init_std: float = field(default=0.02, metadata=between(0, 1000))
    """Standard deviation of initial weights."""
    pad_id: int = field(default=0, metadata=ID)
    """[PAD]."""
    cls_id: int = field(default=101, metadata=ID)
    """[CLS], first token of a text on its own."""
    sep_id: int = field(default=102, metadata=ID)
    """[SEP], last token of every text."""
    dec_id: int = field(default=30522, metadata=ID)
    """[DEC], first token of a text to be written."""
    enc_id: int = field(default=30523, metadata=ID)
    """[ENC], first token of a text to be matched with an image."""

    def __post_init__(self) -> None:
        check_fields(self, "text.")
        require(self.width % self.heads == 0, f"text width {self.width} is not a multiple of {self.heads} heads")
        for name in ("pad_id", "cls_id", "sep_id", "dec_id", "enc_id"):
            value = getattr(self, name)
            require(value < self.vocab_size, f"text.{name} {value} is outside the vocabulary of {self.vocab_size}")
