"""How a model is named: a folder, a weight file, or a repository on the hub. Checked without importing torch."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Endings of weight files."""


def check_named(where: str | Path) -> None:
    """Raise FileNotFoundError unless `where` is a folder or weight file, or can be the name of a hub repository."""
    name, path = str(where), Path(where).expanduser()
    if path.is_dir():
        return
    if "://" in name:
        raise FileNotFoundError(f"{where} is an address: download the file first and give its path")
    if name.endswith(SUFFIXES):
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}: give the path of a .safetensors or .pth file")
    elif path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"{where} is not a model directory (one with config.json and model.safetensors), a .pth file or a name on "
            "the hub"
        )
