"""Video clips for an image model: frames side by side (paper, section 5.6), without new weights.

B clips, F frames, P image tokens, V vision width, E embedding width, S image side in pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from blip.models.blip import Towers
from blip.models.protocols import Embeds, require

FRAMES = 8
"""Frames sampled from a clip (paper, section 5.6)."""


def clip_tokens(vision: nn.Module, frames: Tensor) -> Tensor:
    """Encode frames (B, F, 3, S, S) -> their tokens (B, F * P, V), frame after frame.

    A `Blip` or a `Vqa` takes them in place of an image's tokens; the order of frames has no effect.
    """
    size = frames.shape[:2]
    return vision(frames.flatten(0, 1)).unflatten(0, size).flatten(1, 2)


def embed_clip(model: Towers, tokens: Tensor, frames: int) -> Tensor:
    """`clip_tokens` of F frames (B, F * P, V) -> joint embeddings (B, E) of length 1.

    The mean of the frames' projected class tokens, normalised after averaging only, as in the original.
    """
    require(model, Embeds)
    first = tokens.unflatten(1, (frames, -1))[:, :, 0]
    return F.normalize(model.image_proj(first).float().mean(1), dim=-1)
