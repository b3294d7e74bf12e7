"""Paths that a user gave, and names of pictures that data gives: what may be opened. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from pathlib import Path

from blip.data.errors import BadSample, DataError

_ADDRESS = re.compile(r"^(?:[a-z][a-z0-9+.\-]*:/|(?:pipe|data|file|ssh|s3|gs|hf):)", re.IGNORECASE)
_PLAIN = re.compile(r"^[\w\-][\w\-./ ]*\Z")
"""Nearly all image paths; what does not match is looked at more closely."""


def is_plain_path(path: str) -> bool:
    """Whether what a user gave is a path, and no command, address or variable."""
    return not (_ADDRESS.match(path) or "${" in path or path.lstrip().startswith("|"))


def check_spec(path: str) -> str:
    """A path that a user gave for a source, with ~ expanded. Raises DataError for commands, addresses and variables."""
    if not is_plain_path(path):
        raise DataError(f"source {path!r}: only local files are read; download it first, or mount it")
    return os.path.expanduser(path)


def check_name(name: str, root: str | Path) -> str | None:
    """Why an image path written in data may not be opened under `root`, as far as the text tells; None if it may."""
    if _PLAIN.match(name) and ".." not in name:
        return None
    if _ADDRESS.match(name) or name.startswith("\\\\"):
        return f"image {name!r} is an address, and data is never fetched: download the pictures first"
    if "\0" in name or not name:
        return f"image {name!r} is not a path"
    inside = os.path.normpath(os.path.join(root, name))
    if not under(inside, str(root)):
        return f"image {name!r} is outside {root}: set image_root to a folder that holds all pictures (/ allows any)"
    return None


def under(path: str, root: str) -> bool:
    """Whether a path is a folder or leads into it, by its text."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def contained(name: str, root: str | Path) -> Path:
    """The file that a name in data means, links followed. Raises BadSample if that is not under `root`."""
    reason = check_name(name, root)
    if reason:
        raise BadSample(reason)
    path = os.path.realpath(os.path.join(root, name))
    if not under(path, os.path.realpath(root)):
        raise BadSample(f"image {name!r} is a link that leads outside {root}: set image_root to / to allow it")
    return Path(path)
