"""How a model is named: a folder, a weight file, or a repository on the hub. Checked without importing torch."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Endings of weight files."""
_NAME, _REVISION = r"\w[\w.-]*/\w[\w.-]*", r"\w[\w.-]*(?:/\w[\w.-]*)*"


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
    elif path.exists() or repository(name) is None:
        raise FileNotFoundError(
            f"{where} is not a model directory (one with config.json and model.safetensors), a .pth file or a name on "
            "the hub (ORG/NAME or ORG/NAME@REVISION)"
        )


def repository(name: str) -> tuple[str, str | None] | None:
    """Split `ORG/NAME` or `ORG/NAME@REVISION`; None if it is not the name of a repository on the hub.

    A revision is a branch, tag or commit. No part of it begins with a dot, so that none leads out of the cache.
    """
    match = re.fullmatch(f"({_NAME})(?:@({_REVISION}))?", name[:500], re.ASCII)
    return (match[1], match[2]) if match else None
