"""BLIP: one image encoder and one text transformer that embeds, matches and generates.

    model = blip.load("runs/demo/captioner/model")
    model.caption("photo.jpg")
    network, tokenizer = blip.from_pretrained("runs/demo/model")

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
    from blip.app.load import load
    from blip.app.loaded import Loaded
    from blip.app.pipeline import pipeline
    from blip.checkpoints.checkpoint import from_pretrained, push_to_hub, save_pretrained
    from blip.errors import DataError
    from blip.inference.answering import Answer
    from blip.inference.explain import Explanation
    from blip.inference.features import MatchScores
    from blip.inference.generate import CaptionText, generate_texts
    from blip.inference.settings import DECODE_PRESETS, DecodeConfig
    from blip.models.blip import Blip
    from blip.models.presets import BASE, LARGE, SMALL, TINY
    from blip.models.settings import BlipConfig
    from blip.tokenizer import Tokenizer

    __version__: str

_WHERE = {
    "Blip": "blip.models.blip",
    "BlipConfig": "blip.models.settings",
    "TINY": "blip.models.presets",
    "SMALL": "blip.models.presets",
    "BASE": "blip.models.presets",
    "LARGE": "blip.models.presets",
    "Answer": "blip.inference.answering",
    "CaptionText": "blip.inference.generate",
    "DataError": "blip.errors",
    "DecodeConfig": "blip.inference.settings",
    "DECODE_PRESETS": "blip.inference.settings",
    "Explanation": "blip.inference.explain",
    "Loaded": "blip.app.loaded",
    "MatchScores": "blip.inference.features",
    "load": "blip.app.load",
    "pipeline": "blip.app.pipeline",
    "generate_texts": "blip.inference.generate",
    "Tokenizer": "blip.tokenizer",
    "from_pretrained": "blip.checkpoints.checkpoint",
    "save_pretrained": "blip.checkpoints.checkpoint",
    "push_to_hub": "blip.checkpoints.checkpoint",
}
_RENAMED = {"Features": "Loaded", "Matches": "MatchScores", "write": "generate_texts"}
__all__ = [
    "BASE",
    "DECODE_PRESETS",
    "LARGE",
    "SMALL",
    "TINY",
    "Answer",
    "Blip",
    "BlipConfig",
    "CaptionText",
    "DataError",
    "DecodeConfig",
    "Explanation",
    "Loaded",
    "MatchScores",
    "Tokenizer",
    "__version__",
    "from_pretrained",
    "generate_texts",
    "load",
    "pipeline",
    "push_to_hub",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("blip.options").version()
    if name in _RENAMED:
        raise AttributeError(f"blip.{name} is now blip.{_RENAMED[name]}")
    if name not in _WHERE:
        raise AttributeError(f"module 'blip' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
