"""What `make install` does with what is there already; the programs that it calls note how they were called."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
PROGRAM = """#!/bin/sh
echo "{name} $*" >> calls
case "$1 $2" in
  "-c "*) {version} ;;
  "-m pip") test "$3" != --version || {pip} ;;
  "-m venv") for to; do :; done; mkdir -p $to/bin; touch $to/pyvenv.cfg; cp new $to/bin/python; cp new $to/bin/uv ;;
  "-m ensurepip") {ensurepip} ;;
esac
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def program(path, name, version="exit 0", pip="exit 0", ensurepip="exit 0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PROGRAM.format(name=name, version=version, pip=pip, ensurepip=ensurepip))
    path.chmod(0o755)


def install(folder, python="./new"):
    program(folder / "new", "new")
    program(folder / "old", "old", version='echo "too old" >&2; exit 1')
    shutil.copy(MAKEFILE, folder)
    (folder / "pyproject.toml").touch()
    done = subprocess.run(["make", "install", f"PYTHON={python}"], cwd=folder, capture_output=True, text=True)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done, [call for call in calls if " -c " not in call]


def environment(folder, **how):
    (folder / ".venv").mkdir()
    (folder / ".venv" / "pyvenv.cfg").touch()
    program(folder / ".venv" / "bin" / "python", "there", **how)
    program(folder / ".venv" / "bin" / "uv", "there")


def test_an_old_python_leaves_nothing_and_the_right_one_installs(tmp_path):
    done, calls = install(tmp_path, "./old")
    assert (done.returncode != 0, "too old" in done.stderr, calls) == (True, True, [])
    assert not (tmp_path / ".venv").exists()
    done, calls = install(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [call.split(" -e")[0] for call in calls] == [
        "new -m venv .venv",
        "new -m pip --version",
        "new -m pip install --quiet uv",
        "new pip install --quiet --python .venv/bin/python",
    ]
    assert (tmp_path / ".venv" / ".ready").exists()


def test_an_environment_of_an_old_python_is_made_anew(tmp_path):
    environment(tmp_path, version="exit 1")
    done, calls = install(tmp_path)
    assert done.returncode == 0, done.stderr
    assert calls[0] == "new -m venv --clear .venv"


def test_an_environment_without_pip_is_given_it(tmp_path):
    environment(tmp_path, pip="exit 1")
    done, calls = install(tmp_path)
    assert done.returncode == 0, done.stderr
    assert calls[:3] == ["there -m pip --version", "there -m ensurepip", "there -m pip install --quiet uv"]


def test_where_pip_cannot_be_had_a_line_says_what_to_do(tmp_path):
    environment(tmp_path, pip="exit 1", ensurepip="exit 1")
    done, calls = install(tmp_path)
    assert done.returncode != 0
    assert "install python3-venv, or give PYTHON=another" in done.stderr
    assert len(calls) == 2


def test_a_folder_that_is_no_environment_keeps_what_is_in_it(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine.txt").write_text("mine")
    done, calls = install(tmp_path)
    assert done.returncode == 0, done.stderr
    assert calls[0] == "new -m venv .venv"
    assert (tmp_path / ".venv" / "mine.txt").read_text() == "mine"
