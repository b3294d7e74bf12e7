"""`blip duplicates`: groups of images of a folder that are copies of each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from blip.app.commands.shared import MODEL_VARIABLE, IndexOptions, ModelOptions, at_least
from blip.app.exit import SOME_FAILED
from blip.options import argument, option

if TYPE_CHECKING:
    import numpy as np

    from blip.data.image_files import InputImages

COSINE = 0.995
"""Default of --cosine."""
_MOST_BITS = 16

EXAMPLE = """examples:
  blip duplicates photos/ --bits 8
  blip duplicates photos/ --cosine 0.98 --json --model runs/retrieval/model

One line for each group of copies, their paths separated by tabs; images without a copy are not listed, and nothing is
deleted. With --bits images are compared by a perceptual hash, without a model; otherwise by the cosines of their ITC
embeddings, kept in the index of blip search. An image joins the group of the first image, in natural order, that it is
a copy of, so the first of a line is what to keep. Images with the same bytes are always copies. Exit status: 0, or 1 if
some images could not be used, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesOptions(IndexOptions, ModelOptions):
    """Find the images of a folder that are copies of each other; nothing is deleted."""

    folder: str = argument("FOLDER")
    """Folder of images, including its subfolders"""
    cosine: float | None = option(None, metavar="C")
    """Least cosine of the ITC embeddings of copies (default: 0.995)"""
    bits: int | None = option(None, metavar="N")
    """Compare perceptual hashes instead, without a model: most bits, of 64, in which those of copies differ, 0 to 16"""
    json: bool = False
    """Print JSON lines"""
    batch: int = option(16, metavar="N")
    """Number of images per batch"""

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        if self.cosine is not None and self.bits is not None:
            raise ValueError("give either --cosine C or --bits N")
        if self.cosine is not None and not 0 < self.cosine <= 1:
            raise ValueError(f"cosine must be above 0 and at most 1, got {self.cosine}")
        if self.bits is not None and not 0 <= self.bits <= _MOST_BITS:
            raise ValueError(f"bits must be 0 to {_MOST_BITS}, got {self.bits}")
        if self.bits is not None and (self.model or self.index or self.rebuild):
            raise ValueError("--model, --index and --rebuild are of embeddings, and --bits needs none: leave them out")


class Features(NamedTuple):
    """What the readable images of a folder are compared by; N images in natural order."""

    paths: list[str]
    sha256: list[str]
    values: np.ndarray
    """Embeddings of length 1 (N, E), or perceptual hashes (N,) uint64."""


def run(chosen: DuplicatesOptions) -> int:
    """Print the groups; returns the exit status."""
    if not os.path.isdir(chosen.folder):
        raise ValueError(f"{chosen.folder} is not a folder")
    if chosen.bits is None and not (chosen.model or os.environ.get(MODEL_VARIABLE)):
        raise ValueError(
            "no model: give --model DIR, a folder that training wrote (such as runs/demo/model) or a name on the hub, "
            "or --bits 8 to compare perceptual hashes without a model"
        )
    from blip.app.answers import Answers, shown
    from blip.data.image_files import find

    inputs = find([chosen.folder])
    if chosen.bits is None:
        features, failed = _embeddings(chosen, inputs)
        least = COSINE if chosen.cosine is None else chosen.cosine
        measure, by, is_near = cosines, "cosine", lambda values: values >= least
    else:
        features, failed = _hashes(inputs, chosen.batch)
        measure, by, is_near = differing_bits, "bits", lambda values: values <= chosen.bits
    features = _without_links(features)
    grouped = groups(features, lambda some, others: is_near(measure(some, others)))
    with Answers(None, 0) as answers:
        for first, *others in grouped:
            names = [features.paths[one] for one in (first, *others)]
            if chosen.json:
                values = measure(features.values[[first]], features.values[others])[0].tolist()
                same = [features.sha256[one] == features.sha256[first] for one in others]
                answers.json({
                    "path": names[0], "copies": names[1:], by: [round(value, 5) for value in values],
                    "same_bytes": same,
                })  # fmt: skip
            else:
                answers.text(names[0], *map(shown, names[1:]))
        copies = sum(map(len, grouped)) - len(grouped)
        answers.closing = f"{len(features.paths):,} images: {copies:,} are copies of {len(grouped):,} others"
        if failed:
            answers.closing += f"; {failed:,} could not be used"
    return SOME_FAILED if failed else 0


def _without_links(features: Features) -> Features:
    """Leave out links to images that are there, too, which are no copies; their number goes to stderr."""
    numbers: dict[str, int] = {}
    for number, path in sorted(enumerate(features.paths), key=lambda pair: os.path.islink(pair[1])):  # files first
        numbers.setdefault(os.path.realpath(path), number)
    if links := len(features.paths) - len(numbers):
        what = "1 link to an image that is" if links == 1 else f"{links:,} links to images that are"
        print(f"note: left out {what} in the folder as well", file=sys.stderr)
    kept = sorted(numbers.values())
    paths, sha256 = ([values[number] for number in kept] for values in features[:2])
    return Features(paths, sha256, features.values[kept])


def _embeddings(chosen: DuplicatesOptions, inputs: InputImages) -> tuple[Features, int]:
    """Update the index and take what it knows of the images; returns the number of unusable ones as well."""
    from blip.app.index import up_to_date
    from blip.app.loaded import load

    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer, batch=chosen.batch)
    index, _ = up_to_date(Path(chosen.folder), inputs, loaded, chosen.model, where=chosen.index, rebuild=chosen.rebuild)
    failed = len(index.entries) - len(index.readable)  # also those found unusable before
    paths = [str(path) for path in index.paths(range(len(index.readable)))]
    return Features(paths, [entry.sha256 for entry in index.readable], index.embeddings.numpy()), failed


def _hashes(inputs: InputImages, batch: int) -> tuple[Features, int]:
    """Read the images and hash them; returns the number of unusable ones as well."""
    import numpy as np

    from blip.app.answers import Answers
    from blip.data.image_files import read_images
    from blip.data.phash import phash

    paths, sha256, hashes = [], [], []
    with Answers(None, inputs) as answers:
        for images in read_images(inputs.paths, lambda image: int(phash(image), 16), batch):
            for image in answers.readable(images):
                paths.append(image.path)
                sha256.append(image.digest)
                hashes.append(image.pixels)
            answers.advance(len(images))
    return Features(paths, sha256, np.array(hashes, dtype=np.uint64)), answers.failed


# Comparing ------------------------------------------------------------------------------------------------------------


def cosines(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Embeddings (N, E) and (M, E) of length 1 -> (N, M)."""
    return some @ others.T


def differing_bits(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Hashes (N,) and (M,) uint64 -> (N, M), the number of bits in which they differ."""
    import numpy as np

    return np.bitwise_count(some[:, None] ^ others)


def groups(features: Features, are_near: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[list[int]]:
    """Numbers of the images of each group of two or more, in order, a group where its first image is.

    An image joins the group of the first image before it that has its bytes, or else that is near. So those that start
    a group or are alone are near none before them.
    """
    import numpy as np

    from blip.data.near import earliest_near

    first_of: dict[str, int] = {}
    joins = {number: first_of.setdefault(digest, number) for number, digest in enumerate(features.sha256)}
    files = np.array(sorted(first_of.values()), dtype=np.int64)
    earliest = earliest_near(features.values[files], are_near)
    joins |= zip(files.tolist(), files[earliest].tolist(), strict=True)
    return _gathered(joins)


def _gathered(joins: Mapping[int, int]) -> list[list[int]]:
    """Collect the groups from what each image joins: itself, or one before it."""
    start: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for number in sorted(joins):
        start[number] = number if joins[number] == number else start[joins[number]]
        members.setdefault(start[number], []).append(number)
    return [group for group in members.values() if len(group) > 1]
