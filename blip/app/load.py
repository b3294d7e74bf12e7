"""`blip.load`: a model with all that it can do."""

from __future__ import annotations

from pathlib import Path

import torch

from blip.app.loaded import Loaded, open_model


def load(
    where: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
    batch: int = 16,
    urls: bool = False,
) -> Loaded:
    """Load a model of any kind, ready to caption, answer, match or embed.

    `where` is a model folder, a released `.pth`, a folder of transformers, or a name on the hub: `ORG/NAME` or
    `ORG/NAME@REVISION`; `revision` is a branch, tag or commit there. `device` "auto" is a GPU if there is one. Weights
    are converted to `dtype`; for another `image_size` (pixels) positions are interpolated. `tokenizer` is for models
    without one. `batch` images go through the model at once. `urls` allows images to be given as http(s) addresses.
    Errors are as in `from_pretrained`, one line each; ValueError also for a device that cannot be used.
    """
    return open_model(
        where, revision=revision, device=device, dtype=dtype, image_size=image_size, tokenizer=tokenizer, batch=batch,
        urls=urls,
    )  # fmt: skip
