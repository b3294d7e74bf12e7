"""The version: one copy, in every program, at once."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import blip
import capfilt
from blip import options
from blip.app import cli

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    *("blip.app.cli", "capfilt", "eval", "recipes", "recipes.pretrain", "recipes.bootstrap"),
    *("blip.app.cli caption", "capfilt plan", "eval captioning", "recipes caption"),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_its_version_without_torch(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", *program.split(), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"openblip {metadata.version('openblip')}\n", "")


def test_there_is_one_copy(capfd):
    assert blip.__version__ == capfilt.__version__ == metadata.version("openblip")
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out == f"openblip {blip.__version__}\n"
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        capfilt.version  # noqa: B018


def test_a_checkout_that_is_not_installed(monkeypatch, tmp_path):
    (tmp_path / "blip").mkdir()
    shutil.copy(options.__file__, tmp_path / "blip/options.py")
    monkeypatch.setattr(options, "__file__", str(tmp_path / "blip/options.py"))

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert options.version() == "unknown"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "openblip"\nversion = "7.1"\n')
    assert options.version() == "7.1+checkout"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "7.1"\n')
    assert options.version() == "unknown"
    (tmp_path / "pyproject.toml").write_text("[project")
    assert options.version() == "unknown"
