"""Normalisation of pixels for the image encoder."""

from __future__ import annotations

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training images, by channel; every released BLIP expects them."""
