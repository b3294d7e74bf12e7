"""What a model can do, measured: `blip-eval`."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m` has put the current folder first on the path
    from importlib.util import module_from_spec, spec_from_file_location

    _startup = spec_from_file_location("startup", f"{__path__[0]}/../blip/startup.py")
    _startup.loader.exec_module(module_from_spec(_startup))
