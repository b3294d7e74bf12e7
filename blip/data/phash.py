"""Perceptual hashes: 64 bits that hardly change when an image is scaled, compressed again or recoloured a little.

The bits are those of `imagehash.phash`, so lists that were made with that package can be used. It is not a dependency:
it brings scipy and PyWavelets for what are ten lines here.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BITS = 64
_SIDE, _LOW = 32, 8
_WAVES = np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5))
"""Lowest frequencies of a discrete cosine transform, (8, 32)."""


def phash(image: Image.Image) -> str:
    """Return 16 hex digits: which of an image's 8 x 8 lowest frequencies exceed their median, row by row."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    # Rounded, so that a wave which is not there is 0 on every machine.
    waves = np.round(_WAVES @ grey @ _WAVES.T, 6)
    return np.packbits(waves > np.median(waves)).tobytes().hex()
