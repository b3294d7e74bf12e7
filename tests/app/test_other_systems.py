"""macOS and Windows lack what is taken away here: everything is imported, and started where that is all there is."""

import subprocess
import sys

import pytest

WITHOUT = """
import importlib, os, pkgutil, signal, sys
OURS = ("blip", "capfilt", "eval", "recipes")

def import_all():
    for name in OURS:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, name + "."):
            if not found.name.endswith("__main__"):
                try:
                    importlib.import_module(found.name)
                except ModuleNotFoundError as error:
                    if error.name not in ("gradio", "ray", "av"):  # extras
                        raise

import_all()  # what others wrote looks at sys.platform, so it is imported on the system that there is
for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
    del sys.modules[name]
for module in {modules}:
    sys.modules[module] = None
for place, names in ((os, {os}), (signal, {signal})):
    for name in names:
        if hasattr(place, name):
            delattr(place, name)
import_all()
print(sum(name.partition(".")[0] in OURS for name in sys.modules))
"""
SYSTEMS = {
    "macOS": {"modules": [], "os": ["sched_getaffinity", "sched_setaffinity", "posix_fadvise"], "signal": []},
    "Windows": {
        "modules": ["fcntl", "resource", "termios", "pwd", "grp"],
        "os": ["sched_getaffinity", "killpg", "nice", "pread", "setsid", "getuid", "fork", "posix_fadvise"],
        "signal": ["SIGUSR1", "SIGKILL", "SIGBUS", "SIGCHLD", "SIGHUP"],
    },
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_module_can_be_imported(system, tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(**SYSTEMS[system])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 150
