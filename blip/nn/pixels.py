"""Normalisation of pixels for the image encoder. S image side in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training images, by channel; every released BLIP expects them."""
_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))


def normalise(pixels: Tensor) -> Tensor:
    """Take mean and deviation out of pixels (..., 3, S, S), uint8 -> float32, on their device."""
    # As torchvision's to_tensor and normalize, to the bit, without their checks, which take longer than the work.
    mean, std = (values.to(pixels.device, non_blocking=True) for values in (_MEAN, _STD))
    return pixels.float().div_(255).sub_(mean).div_(std)
