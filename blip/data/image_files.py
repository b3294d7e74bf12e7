"""The images given to a sub-command: find the files, and read them ahead of the model."""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from blip.data.ahead import read_ahead
from blip.data.folders import Walk, files
from blip.data.formats.tars import IMAGES, TEXTS
from blip.data.images import UnreadableImage, model_input, read
from blip.data.paths import alternatives, matching
from blip.data.settings import DataConfig
from blip.errors import DataError

_MOST_THREADS = 8
_EXPECTED = f"looked for names ending in {', '.join(sorted(IMAGES))}"


class ImageFile(NamedTuple):
    """A file, with its image if it could be read."""

    path: str
    """Path of the image as given, or the given folder joined with the name inside it."""
    digest: str
    """SHA-256 of its bytes, hexadecimal; empty if it could not be read."""
    pixels: Any
    """What the transform made of the image, such as the model's input (3, S, S); None if it could not be read."""
    reason: str
    """Reason why the file cannot be used; empty if it can."""


class InputImages(NamedTuple):
    """Image files named on a command line."""

    paths: list[str]
    """Images, each once, in natural order (2 before 10)."""
    left_out: Counter[str]
    """Number of files in folders that are neither named like images nor side-cars of some, by extension."""
    walk: Walk
    """Record of the folders that could not be listed or were left out."""
    folders: Mapping[str, str] = {}
    """The given folder in which each image was, or else the image's own folder."""

    @property
    def total(self) -> int:
        """Number of images, and of entries that could not be listed."""
        return len(self.paths) + len(self.walk.unreadable)


def not_images(suffixes: Counter[str]) -> str:
    """Notes for the user about files left out, if any."""
    common = ", ".join(suffix for suffix, _ in suffixes.most_common(5)) + ", ..." * (len(suffixes) > 5)
    return f"left out {suffixes.total()} files that are not named like images ({common})" if suffixes else ""


def find(given: Sequence[str], *, recursive: bool = True, beside: Sequence[str] = ()) -> InputImages:
    """Find the images in files, folders and globs.

    A file given by name may have any name; in folders and their subfolders, linked ones included, files named like
    images and not hidden are used, with `recursive` those of subfolders, too. Texts beside their images, which end in
    .txt, .caption or one of `beside`, are not counted as left out. DataError for a name that matches nothing.
    """
    paths: dict[tuple[str, str], str] = {}  # by real location, so that a file named twice is used once
    folders: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    walk, real = Walk(), functools.cache(os.path.realpath)
    inside = functools.partial(_in_folder, left_out=left_out, walk=walk, recursive=recursive, beside=beside)
    for name in given:
        for at, path in ((at, path) for one in alternatives(name) for at, path in _files(one, inside, walk)):
            folder, file = os.path.split(path)
            folders.setdefault(paths.setdefault((real(folder), file), path), at or folder or ".")
    if not paths:
        raise DataError(f"no images in {', '.join(given)}: {_EXPECTED}{_unreadable(walk)}")
    return InputImages(sorted(paths.values(), key=natural), left_out, walk, folders)


def _files(name: str, inside: Callable[[str], Iterator[str]], walk: Walk) -> Iterator[tuple[str, str]]:
    """Yield images with the folder that was given; an empty one for an image given by name."""
    if os.path.isdir(name):
        within = list(inside(name))
        if not within:
            raise DataError(f"no images in {name}: {_EXPECTED}{_unreadable(walk)}")
        yield from ((name, path) for path in within)
    elif os.path.lexists(name):
        yield "", name
    elif glob.has_magic(name):
        matches = matching(name, walk)
        if not matches:
            raise DataError(f"nothing matches {name}{_unreadable(walk)}")
        for match in matches:
            yield from ((match, path) for path in inside(match)) if os.path.isdir(match) else [("", match)]
    else:
        remedy = ": images are not fetched, download them first" if "://" in name else ""
        raise DataError(f"no such file or folder: {name}{remedy}")


def _in_folder(
    folder: str, left_out: Counter[str], walk: Walk, recursive: bool, beside: Sequence[str]
) -> Iterator[str]:
    sidecars = (*(f".{suffix}" for suffix in TEXTS), *beside)
    try:
        for _, group in itertools.groupby(files(folder, walk, recursive=recursive), os.path.dirname):
            paths = list(group)
            images = {path for path in paths if os.path.splitext(path)[1][1:].lower() in IMAGES}
            stems = images | {os.path.splitext(path)[0] for path in images}
            for path in paths:
                if path in images:
                    yield path
                elif any(path.endswith(suffix) and path[: -len(suffix)] in stems for suffix in sidecars):
                    continue
                elif os.path.islink(path) and not os.path.exists(path):  # to a folder of images, it may be
                    walk.unreadable.append((path, f"is a link to {os.readlink(path)}, where nothing can be found"))
                else:
                    left_out[os.path.splitext(path)[1].lower() or "no ending"] += 1
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _unreadable(walk: Walk) -> str:
    return "; " + " ".join(walk.unreadable[0]) if walk.unreadable else ""


def natural(path: str) -> tuple:
    """Sorting key by which a2 comes before A10; names that differ only in case are ordered, too."""
    parts = path.casefold().split("/")
    return [[(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", part)] for part in parts], path


def read_images(paths: Sequence[str], transform: Callable[[Image.Image], Any], batch: int) -> Iterator[list[ImageFile]]:
    """Yield the images at `paths` in order, `batch` at a time, read ahead."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    return read_ahead(paths, batch, lambda path: _read_one(path, transform), threads)


def _read_one(path: str, transform: Callable[[Image.Image], Any]) -> ImageFile:
    try:
        data = read(Path(path))
        pixels = model_input(data, DataConfig.max_pixels, transform)
        return ImageFile(path, hashlib.sha256(data).hexdigest(), pixels, "")
    except UnreadableImage as error:
        return ImageFile(path, "", None, error.reason)
