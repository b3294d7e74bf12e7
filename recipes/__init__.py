"""Training recipes, from pre-training to fine-tuning, and whole experiments: `blip-recipe`."""

import sys
from importlib.machinery import SourceFileLoader

_startup = type(sys)("startup")  # found here and not on the path, where the current folder may be first
_startup.__file__ = f"{__path__[0]}/../blip/startup.py"
SourceFileLoader("startup", _startup.__file__).exec_module(_startup)

if "--version" in sys.argv[1:] and _startup._is_ours():  # as `python -m recipes.X`, which would import torch first
    from blip.options import PROJECT, version

    print(PROJECT, version())
    sys.exit()
