"""How pixels are normalised before an image encoder sees them."""

from __future__ import annotations

MEAN = (0.48145466, 0.4578275, 0.40821073)


STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images; every released BLIP expects them."""
