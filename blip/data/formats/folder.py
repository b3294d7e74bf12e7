"""Folders of image files: image folders with their metadata or with side-cars, and img2dataset's `files`."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from blip.data.folders import Walk, files
from blip.data.formats.parquet import parquet_file, values_of
from blip.data.formats.rows import NO_COLUMN, Columns, StoredRow, choose, row_of
from blip.data.formats.tars import IMAGES, TEXTS
from blip.data.images import read
from blip.data.paths import contained
from blip.errors import BadSample, DataError, counted

_METADATA = ("metadata.jsonl", "metadata.csv")
_SIDECARS = sorted(TEXTS, reverse=True)
"""Endings of side-cars, the one that is read first."""
_LONGEST = 1 << 20
"""Most bytes of a side-car."""


def metadata(folder: Path, *, within: bool = True) -> list[Path]:
    """The metadata files of a folder and of the folders in it: of each folder metadata.jsonl, or else metadata.csv."""
    folders = [folder, *sorted({file.parent for name in _METADATA for file in folder.glob(f"*/{name}")})]
    lists = (next((f for name in _METADATA if (f := at / name).is_file()), None) for at in folders)
    return [file for file in lists if file is not None and (within or file.parent == folder)]


def images_beside(file: Path) -> Path:
    """The folder whose images a parquet file of img2dataset describes."""
    return file.with_suffix("")


class Downloaded:
    """The images of one img2dataset folder, listed by the parquet file beside it."""

    def __init__(self, file: Path, requested: Columns):
        """DataError if the parquet file is another program's."""
        self.folder = images_beside(file)
        present = {}
        for name in sorted(os.listdir(self.folder)):
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() in IMAGES:
                present[stem] = f"{self.folder.name}/{name}"
        every = list(values_of(parquet_file(file).read(use_threads=False)))
        if every and not {"key", "status"} <= every[0].keys():
            raise DataError(f"{file} has no columns key and status, so it is not img2dataset's")
        self.values = [row for row in every if row["status"] == "success"]
        caption = requested.caption
        if every and caption != Columns().caption:  # images may have been fetched without any
            caption = choose(list(every[0]), requested, "caption", file)
        self.columns = Columns("image", caption)
        for row in self.values:
            row["image"] = present.get(str(row["key"]))
        self.failed = len(every) - len(self.values)
        """Number of rows that were never downloaded, which are not part of the data."""
        self.gone = sum(row["image"] is None for row in self.values)
        """Images that were there and are not any more."""

    def rows(self) -> Iterator[StoredRow]:
        for number, values in enumerate(self.values):
            yield row_of(number, values, self.columns)


def sidecars_of(names: Iterable[str]) -> dict[str, str]:
    """The side-car of each image among the names of files that has one.

    Of a.jpg that is a.jpg.txt, a.jpg.caption, a.txt or a.caption: the first of these that there is.
    """
    images, texts = [], {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffix = suffix[1:].lower()
        if suffix in IMAGES:
            images.append(name)
        elif suffix in TEXTS:
            texts.setdefault((stem, suffix), name)
    by_image = {}
    for image in images:
        places = ((stem, suffix) for stem in (image, os.path.splitext(image)[0]) for suffix in _SIDECARS)
        if sidecar := next((texts[place] for place in places if place in texts), None):
            by_image[image] = sidecar
    return by_image


def captions_of(sidecar: bytes) -> list[str] | None:
    """The captions in a side-car, one a line; None if it is not UTF-8 text."""
    try:
        text = sidecar.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
    return None if "\0" in text else [line for line in lines if line]


class ImagesWithSidecars:
    """The images of a folder and its subfolders, with their captions in side-cars: text files, a caption a line."""

    def __init__(self, folder: Path) -> None:
        """DataError names images that share a side-car, as one of them would have the other's caption."""
        self.folder, walk = folder, Walk()
        try:
            names = sorted(os.path.relpath(path, folder) for path in files(str(folder), walk))
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
        self.images = [name for name in names if name.rpartition(".")[2].lower() in IMAGES]
        self.sidecars = sidecars_of(names)
        self.notes = [f"{path} {reason}" for path, reason in walk.unreadable] + walk.notes
        """Folders that could not be read or were not followed."""
        images_of = defaultdict(list)
        for image, sidecar in self.sidecars.items():
            images_of[sidecar].append(image)
        if shared := [f"{' and '.join(images)} share {name}" for name, images in images_of.items() if len(images) > 1]:
            example = os.path.basename(images_of[shared[0].rpartition(" share ")[2]][0])
            raise DataError(f"{folder}: {counted(shared, 'side-car')}: name each after its image, as {example}.txt")

    def rows(self, requested: Columns) -> Iterator[StoredRow]:
        """The images in the order of their paths; one without a side-car has no caption."""
        for number, image in enumerate(self.images):
            captions: list[str] | BadSample
            try:
                captions = [] if requested.caption in (None, NO_COLUMN) else self._captions(image)
            except BadSample as error:
                captions = error
            yield StoredRow(number, image, image, captions, {}, Columns())

    def _captions(self, image: str) -> list[str]:
        name = self.sidecars.get(image)
        if name is None:
            stem = os.path.splitext(image)[0]
            raise BadSample(f"image {image} has no caption: there is no {stem}.txt or {stem}.caption", "no_caption")
        try:
            text = read(contained(name, self.folder))
        except BadSample as error:
            raise BadSample(f"side-car {name}: {error.reason}", "unreadable") from None
        if len(text) > _LONGEST:
            raise BadSample(
                f"side-car {name} has {len(text):,} bytes, more than the limit of {_LONGEST:,}", "unreadable"
            )
        captions = captions_of(text)
        if captions is None:
            raise BadSample(f"side-car {name} is not UTF-8 text", "unreadable")
        if not captions:
            raise BadSample(f"side-car {name} is empty", "no_caption")
        return captions

    def identity(self) -> str:
        """Hash of the names and sizes of the images and the captions of each."""
        h = hashlib.sha256()
        for row in self.rows(Columns()):
            texts = row.captions if isinstance(row.captions, list) else None
            h.update(repr((row.image, _size(self.folder / row.key), texts)).encode("utf-8", "surrogatepass"))
        return h.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a broken link
        return -1
