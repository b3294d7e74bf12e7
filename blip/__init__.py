"""BLIP: one image encoder and one text transformer that embeds, matches and generates.

    blip.load("runs/demo/model").match(["photo.jpg"], ["a dog", "a cat"]).probability
    model, tokenizer = blip.from_pretrained("runs/demo/model")

Names are loaded when first used, so `import blip` is quick.
"""

import sys
from importlib.machinery import SourceFileLoader

_startup = type(sys)("startup")  # found here and not on the path, where the current folder may be first
_startup.__file__ = f"{__path__[0]}/startup.py"
SourceFileLoader("startup", _startup.__file__).exec_module(_startup)

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from blip.checkpoints.checkpoint import from_pretrained, push_to_hub, save_pretrained
    from blip.inference.features import Features, MatchScores, load
    from blip.inference.generate import generate_texts
    from blip.inference.settings import DECODE_PRESETS, DecodeConfig
    from blip.models.blip import Blip
    from blip.models.presets import BASE, LARGE, SMALL, TINY
    from blip.models.settings import BlipConfig
    from blip.tokenizer import Tokenizer

_WHERE = {
    "Blip": "blip.models.blip",
    "BlipConfig": "blip.models.settings",
    "TINY": "blip.models.presets",
    "SMALL": "blip.models.presets",
    "BASE": "blip.models.presets",
    "LARGE": "blip.models.presets",
    "DecodeConfig": "blip.inference.settings",
    "DECODE_PRESETS": "blip.inference.settings",
    "Features": "blip.inference.features",
    "MatchScores": "blip.inference.features",
    "load": "blip.app.load",
    "generate_texts": "blip.inference.generate",
    "Tokenizer": "blip.tokenizer",
    "from_pretrained": "blip.checkpoints.checkpoint",
    "save_pretrained": "blip.checkpoints.checkpoint",
    "push_to_hub": "blip.checkpoints.checkpoint",
}
_RENAMED = {"Matches": "MatchScores", "write": "generate_texts"}
__all__ = [
    "BASE",
    "DECODE_PRESETS",
    "LARGE",
    "SMALL",
    "TINY",
    "Blip",
    "BlipConfig",
    "DecodeConfig",
    "Features",
    "MatchScores",
    "Tokenizer",
    "from_pretrained",
    "generate_texts",
    "load",
    "push_to_hub",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"blip.{name} is now blip.{_RENAMED[name]}")
    if name not in _WHERE:
        raise AttributeError(f"module 'blip' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
