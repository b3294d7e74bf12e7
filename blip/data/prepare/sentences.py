"""Sentences about several images: NLVR2's pairs, NLVR's three boxes, and the synthetic world's pairs.

A row becomes examples: NLVR2 has one a row, NLVR one for each of the six orders of its boxes. An example is a sample.
B examples, K images of an example, T text tokens, S image side in pixels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from blip.data.draws import Prepare, Sample
from blip.data.formats.json_rows import Row, read_rows
from blip.data.formats.sources import FIRST_ROWS, record, shard_files
from blip.data.images import decode, own_fault
from blip.data.paths import check_name, check_spec
from blip.data.settings import DataConfig, ImageSentences
from blip.data.stream import ListShards
from blip.errors import BadSample, DataError, shown
from blip.keyed import Purpose, mix
from blip.objectives.batch import SentenceBatch
from blip.text import clean_caption, clean_question, is_sided
from blip.tokenizer import Tokenizer

_NLVR2_ID = re.compile(r"([A-Za-z]+[0-9]*)-(\d+)-(\d+)-(\d+)\Z")
_NLVR_ID = re.compile(r"(\d+)-(\d+)\Z")
_ORDERS = 6
"""Images of an NLVR row: the orders of its three boxes."""
BOXES = 3
"""Boxes of an NLVR image."""
_PLACES = re.compile(r"\b(?:first|second|third|middle|central|last)\b", re.IGNORECASE)
"""Words that refer to images by their order, apart from left and right."""


@dataclass(frozen=True)
class Example:
    """A stored sentence about images."""

    id: str
    """Identifier of the example, as in a results file."""
    group: str
    """Group of the examples of one sentence, for consistency: all of them answered correctly."""
    fold: str
    """Group of examples that share images or a sentence: all in `train` or all in `val` if a file is split."""
    sentence: str
    label: bool | None
    """Whether the sentence is true; None if the data has no label."""
    images: tuple[Path, ...]
    """The images' files, or one file with all of them beside each other."""
    root: Path
    """Folder that the images must be in, links followed."""
    where: str
    """Name `file:row`, for messages."""
    boxes: int = 1
    """Images in each file."""

    @property
    def count(self) -> int:
        """Images."""
        return self.boxes * len(self.images)

    @property
    def key(self) -> str:
        """`file:row id`"""
        return f"{self.where} {self.id}"


class Sentences:
    """The examples of one annotation file, by number; a source of `blip.data.draws.Draws`."""

    kind = "human"

    def __init__(self, config: ImageSentences) -> None:
        """Read the file. DataError names the file, row and id at fault, and what was expected."""
        self.config, self.weight = config, config.weight
        self.path = Path(check_spec(config.path))
        find = _finder(config, self.path)
        rows = (_examples(self.path, number, row, find) for number, row in read_rows(self.path))
        self.examples = [example for examples in rows for example in examples if _is_wanted(example, config)]
        if not self.examples:
            part = "" if config.part == "all" else f" in part {config.part!r}"
            raise DataError(f"{self.path}: no examples{part}")
        _refuse_repeated(self.path, self.examples)
        self.count = self.examples[0].count
        for example in self.examples:
            _check_count(example, self.examples[0])

    def check_some_exist(self) -> None:
        """Raise DataError if none of some images, evenly spread, exists: a wrong image_root is found at the start."""
        _check_some_exist(self.config, self.examples[:: max(1, len(self) // 16)])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> Example:
        return self.examples[row]

    def key(self, row: int) -> str:
        return self.examples[row].key

    def identity(self) -> str:
        config = self.config
        chosen = (config.part, config.held_out, config.weight, len(self), self.count)
        return json.dumps([self.path.name, self.path.stat().st_size, *chosen])


class SentenceShards(ListShards):
    """The examples of annotation files, read in sequence."""

    def __init__(self, config: ImageSentences) -> None:
        """Raise DataError if there are no examples, or none of the first images exists."""
        files = shard_files(config.path, "json")
        self._find = {file: _finder(config, file) for file in files}
        self._first: Example | None = None
        super().__init__(config, files)
        usable = (example for example in self.read(files[0]) if isinstance(example, Example))
        if first := list(islice(usable, FIRST_ROWS)):
            self._first = first[0]
            _check_some_exist(config, first)

    @property
    def count(self) -> int:
        """Images of an example."""
        return self._first.count if self._first else 0

    def records(self, file: Path, number: int, row: Row) -> list[Example]:
        examples = [e for e in _examples(file, number, row, self._find[file]) if _is_wanted(e, self.config)]
        for example in examples:
            _check_count(example, self._first or example)
        return examples


def _check_some_exist(config: ImageSentences, examples: Sequence[Example]) -> None:
    if not any(image.exists() for example in examples for image in example.images):
        raise DataError(
            f"source {config.path}: none of its images exists; looked for {examples[0].images[0]}. "
            "Set image_root to the folder that holds them"
        )


def _check_count(example: Example, first: Example) -> None:
    if example.count != first.count:
        raise DataError(
            f"{example.where} has {example.count} images, {first.where} has {first.count}; "
            "expected as many in every row"
        )


def _is_wanted(example: Example, config: ImageSentences) -> bool:
    if config.part == "all":
        return True
    is_val = mix(Purpose.HELD_OUT, *example.fold.encode()) % 1000 < 1000 * config.held_out
    return is_val == (config.part == "val")


def _refuse_repeated(path: Path, examples: Sequence[Example]) -> None:
    first: dict[str, str] = {}
    for example in examples:
        if example.id in first:
            raise DataError(
                f"{path}: duplicate sentence {example.id}, in {first[example.id]} and {example.where}; "
                "expected each id once"
            )
        first[example.id] = example.where


# Rows -----------------------------------------------------------------------------------------------------------------


def _finder(config: ImageSentences, path: Path) -> _Finder:
    root = Path(os.path.abspath(check_spec(config.image_root))) if config.image_root else path.absolute().parent
    if not root.is_dir():
        raise DataError(f"source {config.path}: image_root {root} is not a folder")
    return _Finder(root)


def _examples(path: Path, number: int, row: Row, find: _Finder) -> list[Example]:
    """The examples of a row. Raises DataError."""
    place, where = f"{path}: row {number}", f"{path.name}:{number}"
    sentence = row.get("sentence")
    if not isinstance(sentence, str) or not sentence.strip():
        raise DataError(f"{place} has no 'sentence' ({_columns(row)})")
    label = _label(row, place)
    name, images = row.get("identifier"), row.get("images")
    if images is not None:
        if not isinstance(images, list) or len(images) < 2 or not all(isinstance(i, str) for i in images):
            raise DataError(f"{place}: 'images' is {str(images)[:60]!r}; expected a list of two or more paths")
        name = name if isinstance(name, str) else where
        paths = tuple(find(place, i) for i in images)
        return [Example(name, *_group(name), sentence, label, paths, find.root, where)]
    if isinstance(name, str) and (match := _NLVR2_ID.match(name)):
        split, series, pair, _ = match.groups()
        files = (f"{split}-{series}-{pair}-img{k}.png" for k in range(2))
        paths = tuple(find(place, file, split, row.get("directory")) for file in files)
        return [Example(name, *_group(name), sentence, label, paths, find.root, where)]
    if isinstance(name, str) and (match := _NLVR_ID.match(name)):
        files = [f"{path.stem}-{name}-{k}.png" for k in range(_ORDERS)]
        images = [find(place, file, path.stem, row.get("directory")) for file in files]
        both = zip(files, images, strict=True)
        return [Example(f, match[1], match[1], sentence, label, (i,), find.root, where, BOXES) for f, i in both]
    raise DataError(
        f"{place} has neither 'images' nor an 'identifier' such as dev-850-0-1 (NLVR2) or 1572-0 (NLVR) "
        f"({_columns(row)})"
    )


def _group(name: str) -> tuple[str, str]:
    """Group and fold of an identifier; an example of another naming is alone in both."""
    match = _NLVR2_ID.match(name)
    return (f"{match[1]}-{match[2]}-{match[4]}", f"{match[1]}-{match[2]}") if match else (name, name)


def _label(row: dict[str, Any], where: str) -> bool | None:
    label = row.get("label")
    if label is None or isinstance(label, bool):
        return label
    text = str(label).lower()
    if text not in ("true", "false"):
        raise DataError(f"{where}: the label is {shown(label)}; expected True or False")
    return text == "true"


def _columns(row: dict[str, Any]) -> str:
    return f"it has: {', '.join(sorted(map(str, row)))[:200] or 'nothing'}"


class _Finder:
    """Search for images: in the root itself, or in the folders that the data sets come with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._layout: str | None = None

    def __call__(self, where: str, name: str, split: str = "", directory: Any = None) -> Path:
        reason = check_name(name, self.root)
        if reason:
            raise DataError(f"{where}: {reason}")
        if directory is not None and not re.fullmatch(r"\d+", str(directory)):
            raise DataError(f"{where}: the directory is {shown(directory)}; expected a number")
        if self._layout is None:
            layouts = ["", "images", split, f"images/{split}"]
            layouts += [f"{layout}/DIRECTORY" for layout in layouts] if directory is not None else []
            there = [layout for layout in layouts if (self._folder(layout, directory) / name).exists()]
            if not there:
                return self.root / name
            self._layout = there[0]
        return self._folder(self._layout, directory) / name

    def _folder(self, layout: str, directory: Any) -> Path:
        return self.root / layout.replace("DIRECTORY", str(directory)).lstrip("/")


# Images ---------------------------------------------------------------------------------------------------------------


def read_images(example: Example, max_pixels: int, at_least: int | None = None) -> list[Image.Image]:
    """The K images of an example, RGB; `at_least` as in `images.decode`. Raises BadSample that names the file."""
    images = []
    for path in example.images:
        try:
            inside = record(example.id, str(path), example.sentence, example.root).image
            with own_fault():
                images += cut(decode(inside, max_pixels, at_least if example.boxes == 1 else None), example.boxes)
        except BadSample as error:
            raise BadSample(f"{path.name}: {error.reason}") from None
    return images


def cut(image: Image.Image, boxes: int) -> list[Image.Image]:
    """Cut a wide image into its boxes: squares of its height, evenly spaced from edge to edge."""
    if boxes == 1:
        return [image]
    side = min(image.height, image.width // boxes)
    lefts = [round(k * (image.width - side) / (boxes - 1)) for k in range(boxes)]
    return [image.crop((left, 0, left + side, image.height)) for left in lefts]


def open_sentences(config: DataConfig) -> list[Sentences] | list[SentenceShards]:
    """The sources of a run, by number or as shards.

    Raises DataError when they differ in the number of images, a label is missing, or none of the images is there.
    """
    sources = [(SentenceShards if config.streaming else Sentences)(source) for source in config.sources]
    if len({source.count for source in sources}) > 1:
        raise DataError("the sources have different numbers of images in an example; train on one kind")
    for source in () if config.streaming else sources:
        source.check_some_exist()
        unknown = next((e for e in source.examples if e.label is None), None)
        if unknown:
            raise DataError(f"{unknown.key} has no label; it can be answered, not learned from")
    return sources


class PrepareSentences(Prepare):
    """Cut, put in order, augment and tokenize: a sample's text is the sentence, its label 1 where that is true.

    Images may be swapped if the sentence does not refer to them by their order.
    """

    def __call__(self, record: Example, key: tuple[int, ...]) -> Sample:
        if record.label is None:
            raise BadSample("the sentence has no label to learn from")
        images = read_images(record, self.config.max_pixels, self.transform.at_least)
        sentence = clean_caption(record.sentence, self.config.max_words)
        sided = is_sided(sentence)
        if not sided and not _PLACES.search(sentence):
            images = _shuffled(images, mix(Purpose.IMAGE_ORDER, *key))
        # Each image is augmented by itself, and none is mirrored where the sentence says left or right.
        with own_fault():
            views = [
                self.transform(image, Purpose.SENTENCE_AUGMENTATION + 10 * k, *key, sided=sided)
                for k, image in enumerate(images)
            ]
        pieces = self.tokenizer.pieces(sentence, self.config.max_tokens)
        return Sample(torch.stack(views), [pieces], record.key, [int(record.label)])

    def collate(self, samples: Sequence[Sample]) -> SentenceBatch:
        return sentence_batch(samples, self.tokenizer)

    def images(self, record: Example) -> Sequence[Path]:
        return record.images

    def texts(self, record: Example) -> list[str]:
        return [clean_question(record.sentence, self.config.max_words)]  # which takes any text


def sentence_batch(samples: Sequence[Sample], tokenizer: Tokenizer) -> SentenceBatch:
    """B samples -> one SentenceBatch, texts padded to the longest."""
    ids, keep = tokenizer.pad([s.texts[0] for s in samples])
    labels = torch.tensor([label for s in samples for label in s.labels])
    bad = [b for s in samples for b in s.bad]
    return SentenceBatch(torch.stack([s.images for s in samples]), ids, keep, labels, [s.key for s in samples], bad)


def _shuffled(images: list[Image.Image], key: int) -> list[Image.Image]:
    rest, order = list(images), []
    while rest:
        order.append(rest.pop(key % len(rest)))
        key //= 7
    return order
