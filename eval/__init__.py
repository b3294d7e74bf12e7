"""Evaluation of models: `blip-eval`."""

import sys
from importlib.machinery import SourceFileLoader

_startup = type(sys)("startup")  # found here and not on the path, where the current folder may be first
_startup.__file__ = f"{__path__[0]}/../blip/startup.py"
SourceFileLoader("startup", _startup.__file__).exec_module(_startup)
