"""Model sizes: TINY and SMALL for the synthetic world, BASE and LARGE from the paper."""

from __future__ import annotations

from blip.models.settings import BlipConfig
from blip.nn.settings import TextConfig, TrainingOptions, VisionConfig

TINY = BlipConfig(
    vision=VisionConfig(
        "vit_tiny_patch16_224", image_size=64, patch_size=16, width=128, depth=4, heads=4, init_gain=1.0
    ),
    text=TextConfig(width=128, layers=2, heads=2, hidden=512, max_positions=64, init_std=0.05),
    embed_dim=128,
)
SMALL = BlipConfig(
    vision=VisionConfig(
        "vit_small_patch16_224", image_size=64, patch_size=16, width=256, depth=6, heads=4, init_gain=1.0
    ),
    text=TextConfig(width=256, layers=4, heads=4, hidden=1024, max_positions=128, init_std=0.04),
    embed_dim=256,
)
BASE = BlipConfig()
LARGE = BlipConfig(vision=VisionConfig("vit_large_patch16_224"))
PRESETS: dict[str, BlipConfig] = {"tiny": TINY, "small": SMALL, "base": BASE, "large": LARGE}


def usual_options(text: TextConfig) -> TrainingOptions:
    """Dropout with which text transformers of a size are trained: BERT's, and none in those narrower than BASE."""
    rate = 0.0 if text.width < BASE.text.width else 0.1
    return TrainingOptions(dropout=rate, attention_dropout=rate)
