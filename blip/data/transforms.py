"""Images to tensors (3, S, S), with augmentation in training. S image side in pixels."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip.data.settings import DataConfig
from blip.keyed import scoped
from blip.nn.pixels import MEAN, STD, normalise

AUGMENTATIONS = (
    "AutoContrast",
    "Brightness",
    "Sharpness",
    "Equalize",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
"""Drawn from together with the identity. Strengths at magnitude 10: factor 1.9, shear 0.3, 10 pixels, 30 degrees."""
_GREY = (128, 128, 128)


def pixels_of(image: Image.Image) -> Tensor:
    """RGB image (S, S) -> its pixels (3, S, S) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class EvalTransform:
    """Resize to a square, bicubic, without regard to the image's shape; then normalise."""

    at_least: int | None = None

    def __init__(self, image_size: int):
        self.image_size = image_size

    def __call__(self, image: Image.Image, *key: int, sided: bool = False) -> Tensor:
        """RGB image of any size -> (3, S, S) float32. `key` and `sided` are for TrainTransform and do nothing."""
        side = self.image_size
        return normalise(pixels_of(image.resize((side, side), Image.Resampling.BICUBIC)))

    def describe(self) -> str:
        """Description of all that fixes the result, for fingerprints."""
        return f"eval {self.image_size}"


class TrainTransform:
    """Random crop, mirror image and RandAugment (section 4.1 of the paper), as a function of the image and a key.

    An image whose caption says left or right is not mirrored unless `flip_sided_captions`.
    """

    def __init__(self, image_size: int, config: DataConfig):
        from timm.data.auto_augment import rand_augment_ops  # here, as both are slow to import
        from torchvision.transforms import InterpolationMode, RandomResizedCrop

        self.image_size = image_size
        self.at_least = 3 * image_size  # the smallest crop, 0.2 of the area, is then still not enlarged
        self.config = config
        scale = (config.crop_scale_min, 1.0)
        self.crop = RandomResizedCrop(image_size, scale=scale, interpolation=InterpolationMode.BICUBIC)
        settings = {"translate_const": 10, "img_mean": _GREY, "interpolation": Image.Resampling.BILINEAR}
        self.augmentations = [
            None,
            *rand_augment_ops(config.augment_magnitude, prob=0.5, hparams=settings, transforms=list(AUGMENTATIONS)),
        ]

    def __call__(self, image: Image.Image, *key: int, sided: bool = False) -> Tensor:
        """RGB image of any size -> (3, S, S) uint8; the same key draws the same crop, mirror and augmentations.

        `Batch.to` normalises it, on the model's device: a quarter of the bytes on the way there.
        """
        side = self.image_size
        if self.config.crop_scale_min == 1.0:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
            if not self.config.flip and not self.config.augment_ops:
                return pixels_of(image)
        with scoped(*key):
            if self.config.crop_scale_min < 1.0:
                image = self.crop(image)
            mirror = random.random() < self.config.flip
            if mirror and (self.config.flip_sided_captions or not sided):
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            for augment in random.choices(self.augmentations, k=self.config.augment_ops):
                image = augment(image) if augment else image
        return pixels_of(image)

    def describe(self) -> str:
        """Description of all that fixes the result, for fingerprints."""
        c = self.config
        values = (self.image_size, c.crop_scale_min, c.flip, c.flip_sided_captions, c.augment_ops, c.augment_magnitude)
        return f"train {values}"


def unnormalise(image: Tensor) -> Tensor:
    """(..., 3, S, S) normalised -> the same shape in [0, 1], for looking at."""
    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (MEAN, STD))
    return (image * std + mean).clamp(0, 1)
