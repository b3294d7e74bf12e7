"""CapFilt, the cleaning job (paper, section 3.3): plan, score once, select as often as wanted, export, report."""

import sys
from importlib.machinery import SourceFileLoader

_startup = type(sys)("startup")  # found here and not on the path, where the current folder may be first
_startup.__file__ = f"{__path__[0]}/../blip/startup.py"
SourceFileLoader("startup", _startup.__file__).exec_module(_startup)


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'capfilt' has no attribute {name!r}")
    from blip import __version__  # when used: while the packages are being found, blip is not complete

    return __version__
