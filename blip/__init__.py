"""BLIP: one image encoder and one text transformer that embeds, matches and writes.

    blip.load("runs/demo/model").match(["photo.jpg"], ["a dog", "a cat"]).probability
    model, tokenizer = blip.from_pretrained("runs/demo/model")

Names are loaded when first used, so `import blip` is quick.
"""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m` has put the current folder first on the path
    from importlib.util import module_from_spec, spec_from_file_location

    _startup = spec_from_file_location("startup", f"{__path__[0]}/startup.py")
    _startup.loader.exec_module(module_from_spec(_startup))

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
