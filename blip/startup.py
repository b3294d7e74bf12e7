"""Safe imports and child processes: nothing comes from the current folder.

`python -m` puts the current folder first on the path, and so does an empty entry of PYTHONPATH. In a downloaded crawl
this would run its numpy.py, and in a folder with an eval.py that file instead of ours. The packages of this project run
this file before anything else; it imports only modules that Python has already loaded.
"""

import os
import sys
from importlib.machinery import PathFinder

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""Folder of our packages."""
OURS = ("blip", "capfilt", "eval", "recipes")
SCRIPTS = ("blip", "capfilt", "blip-eval", "blip-recipe")


def leave_current_folder() -> None:
    """Take the current folder off the path, in this process and in those that it starts; our packages stay importable.

    If the current folder is a checkout that is not installed, it is moved to the end of the path.
    """
    done = os.environ.get("PYTHONSAFEPATH") and not sys.flags.ignore_environment  # by Python, or here before
    if not done and not sys.flags.safe_path and sys.path and _is_here(sys.path[0]):
        del sys.path[0]
    remaining = _remaining()
    left = {one for path in {*_given()} - {*remaining} for one in (path, os.path.abspath(path))} - {*remaining}
    sys.path[:] = [path for path in sys.path if path not in left]
    os.environ.update(environment())
    from importlib.util import module_from_spec  # which imports others

    if _is_here(HOME) and HOME not in sys.path:
        sys.path.append(HOME)
    for name in OURS:
        spec = None if name in sys.modules else PathFinder.find_spec(name, [HOME])
        if spec is not None and spec.loader is not None:
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


def environment() -> dict[str, str]:
    """Environment for a Python process that imports nothing from the current folder."""
    paths = {"PYTHONPATH": os.pathsep.join(_remaining())} if _given() else {}
    return {**os.environ, "PYTHONSAFEPATH": "1", **paths}


def python(module: str, *args: str) -> list[str]:
    """Command line that runs one of our modules in a new Python process, from any folder."""
    return [os.path.abspath(sys.executable), "-P", os.path.join(HOME, "blip", "startup.py"), module, *args]


def program(name: str) -> str | None:
    """Absolute path of a program in one of PATH's absolute folders; None if there is none."""
    from shutil import which

    folders = filter(os.path.isabs, os.environ.get("PATH", os.defpath).split(os.pathsep))
    return which(name, path=os.pathsep.join(folders))


def _given() -> list[str]:
    """Entries of PYTHONPATH; an empty one is the current folder."""
    given = os.environ.get("PYTHONPATH")
    return given.split(os.pathsep) if given else []


def _remaining() -> list[str]:
    """Entries that are not relative to the current folder; a full path to it is intended."""
    return [path for path in _given() if os.path.isabs(path) or not _is_here(path)]


def _is_here(path: str) -> bool:
    return _same(path or os.curdir, os.curdir)


def _same(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _is_ours() -> bool:
    """Whether this process runs one of our programs, by its script or by `python -m`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name != "-m":  # so it is as long as the module is looked for
        return name.removesuffix(".exe") in SCRIPTS
    program = sys.orig_argv[-len(sys.argv)]
    program = program[program.index("m") + 1 :] if program.startswith("-") else program
    return program.partition(".")[0] in OURS


if __name__ == "startup" and _is_ours():
    leave_current_folder()
elif __name__ == "__main__":
    leave_current_folder()
    from runpy import run_module

    del sys.argv[0]
    run_module(sys.argv[0], run_name="__main__")
