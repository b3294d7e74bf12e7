"""Listing of a folder and its subfolders: links to folders are followed, each real folder is listed once."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Walk:
    """Record of a walk: folders and files that it could not read or left out."""

    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Folders and files that could not be read: path and reason."""
    notes: list[str] = field(default_factory=list)
    """Notes on files left out on purpose, one line each."""


def files(folder: str, walk: Walk, *, hidden: bool = False, recursive: bool = True) -> Iterator[str]:
    """Yield the files of a folder and its subfolders, their names joined to the folder's as given.

    A folder that links reach under several names is listed once: under its own name if it is inside, else under that of
    the first link. Broken links count as files. Hidden files are left out unless `hidden`, and subfolders unless
    `recursive`. OSError if `folder` itself cannot be read.
    """
    return (path for path, is_folder in _entries(folder, walk, hidden, recursive) if not is_folder)


def matching(pattern: str, walk: Walk | None = None) -> list[str]:
    """The files and folders that match a glob, sorted; `**` passes through folders as `files` does."""
    parts = pattern.split("/")
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    at = parts.index("**")
    base, wanted = "/".join(parts[:at]) or ("/" if pattern.startswith("/") else ""), parts[at:]
    walk, paths = Walk() if walk is None else walk, set()
    hidden = any(part.startswith(".") for part in wanted)
    for top in sorted(glob.glob(base)) if base else [""]:
        if os.path.isdir(top or "."):
            for path, _ in ((top, True), *_listed(top, walk, hidden)):
                inner = [part for part in path[len(top) :].split("/") if part]
                if path and _fits(inner, wanted):
                    paths.add(path)
    return sorted(paths)


def _listed(top: str, walk: Walk, hidden: bool) -> Iterator[tuple[str, bool]]:
    try:
        yield from _entries(top, walk, hidden)
    except OSError as error:
        walk.unreadable.append((top, f"cannot be read: {error.strerror}"))


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[n:], wanted[1:]) for n in range(len(parts) + 1))
    if not parts or (parts[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    return fnmatch.fnmatch(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _entries(folder: str, walk: Walk, hidden: bool, recursive: bool = True) -> Iterator[tuple[str, bool]]:
    """Files and folders below a folder, and whether it is a folder, in no order."""
    above = {_identity(os.stat(parent)) for parent in Path(os.path.realpath(folder or ".")).parents}
    seen: set[tuple[int, int]] = set()
    # Links wait until no real folder does, so that what lies within has its own name.
    real, links = [folder], []
    while real or links:
        at = real.pop() if real else links.pop(0)
        try:
            identity = _identity(os.stat(at or "."))
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(at or ".") as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if at == folder:
                raise
            walk.unreadable.append((at, f"cannot be read: {error.strerror}"))
            continue
        if at != folder:
            yield at, True
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                continue
            path = os.path.join(at, entry.name)
            if not entry.is_symlink():
                if entry.is_dir(follow_symlinks=False):
                    real += [path] * recursive
                else:
                    yield path, False
                continue
            try:
                target = os.stat(path)
            except OSError:  # what leads nowhere is no folder
                yield path, False
                continue
            if not stat.S_ISDIR(target.st_mode):
                yield path, False
            elif not recursive:
                continue
            elif _identity(target) in above:
                walk.notes.append(f"{path} leads back up to {os.path.realpath(path)} and was not followed")
            else:
                links.append(path)


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino
