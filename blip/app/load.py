"""`blip.load`: a model that computes features of files and texts."""

from __future__ import annotations

from pathlib import Path

import torch

from blip.checkpoints import checkpoint
from blip.data.image_files import reader
from blip.inference.features import Features
from blip.origin import print_note


def load(
    where: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
    batch: int = 32,
) -> Features:
    """Load a model for its features; `where`, `tokenizer` and errors are as in `checkpoint.from_pretrained`.

    Weights are converted to `dtype` on `device`; for another `image_size` (pixels) positions are interpolated.
    ValueError also for a captioner's checkpoint, which cannot match texts with images.
    """
    source = checkpoint.opened(where)
    model, words = checkpoint.from_pretrained(source, image_size=image_size, tokenizer=tokenizer)
    print_note(source.trained_on)
    return Features(model.to(device, dtype), words, reader(model.config.vision.image_size), batch=batch)
