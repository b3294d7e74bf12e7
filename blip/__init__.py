"""BLIP: one image encoder and one text transformer that embeds, matches and writes.

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
    from blip.checkpoint import from_pretrained, push_to_hub, save_pretrained
    from blip.config import BASE, DECODE_PRESETS, LARGE, SMALL, TINY, BlipConfig, DecodeConfig
    from blip.features import Features, Matches, load
    from blip.generate import write
    from blip.model import Blip
    from blip.tokenizer import Tokenizer

_WHERE = {
    "Blip": "blip.model",
    "BlipConfig": "blip.config",
    "TINY": "blip.config",
    "SMALL": "blip.config",
    "BASE": "blip.config",
    "LARGE": "blip.config",
    "DecodeConfig": "blip.config",
    "DECODE_PRESETS": "blip.config",
    "Features": "blip.features",
    "Matches": "blip.features",
    "load": "blip.features",
    "write": "blip.generate",
    "Tokenizer": "blip.tokenizer",
    "from_pretrained": "blip.checkpoint",
    "save_pretrained": "blip.checkpoint",
    "push_to_hub": "blip.checkpoint",
}
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
    "Matches",
    "Tokenizer",
    "from_pretrained",
    "load",
    "push_to_hub",
    "save_pretrained",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'blip' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
