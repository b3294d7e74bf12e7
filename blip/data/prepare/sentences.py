"""Sentences about several pictures: NLVR2's pairs, NLVR's three boxes, and the picture world's pairs.

A row becomes examples: NLVR2 has one a row, NLVR one for each of the six orders of its boxes. B examples, K pictures of
an example, T text tokens, S image side in pixels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip.data.formats.json_rows import read_rows
from blip.data.formats.sources import record
from blip.data.images import decode, own_fault
from blip.data.paths import check_name, check_spec
from blip.data.prepare.captions import Pairs
from blip.data.settings import DataConfig, PictureSentences
from blip.errors import BadSample, DataError, shown
from blip.keyed import mix
from blip.objectives.batch import Bad, SentenceBatch
from blip.text import clean_caption, clean_question, is_sided
from blip.tokenizer import Tokenizer

_NLVR2_ID = re.compile(r"([A-Za-z]+[0-9]*)-(\d+)-(\d+)-(\d+)\Z")
_NLVR_ID = re.compile(r"(\d+)-(\d+)\Z")
_ORDERS = 6
"""Pictures of an NLVR row: the orders of its three boxes."""
BOXES = 3
"""Boxes of an NLVR picture."""
_PLACES = re.compile(r"\b(?:first|second|third|middle|central|last)\b", re.IGNORECASE)
"""Words that tell pictures by their order, apart from left and right."""
_ORDER, _MIRROR, _AUGMENT, _FOLD = range(100, 104)
"""What a key is for; `Pairs` uses the small numbers."""


@dataclass(frozen=True)
class Example:
    """A sentence about pictures, as it is stored."""

    id: str
    """As in a results file."""
    group: str
    """Examples of one sentence: consistent where all of them are answered rightly."""
    fold: str
    """Examples that share pictures or sentence: they are all in `train` or all in `val` where a file is split."""
    sentence: str
    label: bool | None
    """Whether the sentence is true; None where the data does not say."""
    images: tuple[Path, ...]
    """The pictures' files, or one file with all of them beside each other."""
    root: Path
    """The folder that they must be in, links followed."""
    where: str
    """`file:row`, for people."""
    boxes: int = 1
    """Pictures in each file."""

    @property
    def count(self) -> int:
        """Pictures."""
        return self.boxes * len(self.images)

    @property
    def key(self) -> str:
        """`file:row id`"""
        return f"{self.where} {self.id}"


class Sentences:
    """The examples of one annotation file, by number; a source of `blip.data.prepare.captions.Pairs`."""

    kind = "human"

    def __init__(self, config: PictureSentences) -> None:
        """Reads the file. DataError names file, row and id of what does not fit, and what was expected."""
        self.config, self.weight = config, config.weight
        self.path = Path(check_spec(config.path))
        self.examples = [e for e in _examples(self.path, config) if _wanted(e, config)]
        if not self.examples:
            part = "" if config.part == "all" else f" in part {config.part!r}"
            raise DataError(f"{self.path}: no examples{part}")
        _refuse_repeated(self.path, self.examples)
        counts = {example.count for example in self.examples}
        if len(counts) > 1:
            odd = next(e for e in self.examples if e.count != self.examples[0].count)
            raise DataError(
                f"{odd.where} has {odd.count} pictures, {self.examples[0].where} has {self.examples[0].count}; "
                "expected as many in every row"
            )
        self.count = counts.pop()

    def check_some_exist(self) -> None:
        """DataError if none of some pictures, evenly spread, is there: a wrong image_root is found at the start."""
        step = max(1, len(self) // 16)
        if not any(image.exists() for example in self.examples[::step] for image in example.images):
            raise DataError(
                f"source {self.config.path}: none of its pictures is there; looked for {self.examples[0].images[0]}. "
                "Set image_root to the folder that holds them"
            )

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


def _wanted(example: Example, config: PictureSentences) -> bool:
    if config.part == "all":
        return True
    held = mix(_FOLD, *example.fold.encode()) % 1000 < 1000 * config.held_out
    return held == (config.part == "val")


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


def _examples(path: Path, config: PictureSentences) -> Iterable[Example]:
    root = Path(os.path.abspath(check_spec(config.image_root))) if config.image_root else path.absolute().parent
    if not root.is_dir():
        raise DataError(f"source {config.path}: image_root {root} is not a folder")
    find = _Finder(root)
    for number, row in read_rows(path):
        where = f"{path.name}:{number}"
        sentence = row.get("sentence")
        if not isinstance(sentence, str) or not sentence.strip():
            raise DataError(f"{path}: row {number} has no 'sentence' ({_columns(row)})")
        label = _label(row, f"{path}: row {number}")
        yield from _of_row(path, row, where, sentence, label, find)


def _of_row(
    path: Path, row: dict[str, Any], where: str, sentence: str, label: bool | None, find: _Finder
) -> Iterable[Example]:
    name, images = row.get("identifier"), row.get("images")
    said = f"{path}: row {where.rsplit(':', 1)[1]}"
    if images is not None:
        if not isinstance(images, list) or len(images) < 2 or not all(isinstance(i, str) for i in images):
            raise DataError(f"{said}: 'images' is {str(images)[:60]!r}; expected a list of two or more paths")
        name = name if isinstance(name, str) else where
        group, fold = _group(name)
        yield Example(name, group, fold, sentence, label, tuple(find(said, i) for i in images), find.root, where)
    elif isinstance(name, str) and (found := _NLVR2_ID.match(name)):
        split, series, pair, _ = found.groups()
        files = (f"{split}-{series}-{pair}-img{k}.png" for k in range(2))
        group, fold = _group(name)
        paths = tuple(find(said, file, split, row.get("directory")) for file in files)
        yield Example(name, group, fold, sentence, label, paths, find.root, where)
    elif isinstance(name, str) and (found := _NLVR_ID.match(name)):
        for k in range(_ORDERS):
            file = f"{path.stem}-{name}-{k}.png"
            image = find(said, file, path.stem, row.get("directory"))
            yield Example(file, found[1], found[1], sentence, label, (image,), find.root, where, BOXES)
    else:
        raise DataError(
            f"{said} has neither 'images' nor an 'identifier' such as dev-850-0-1 (NLVR2) or 1572-0 (NLVR) "
            f"({_columns(row)})"
        )


def _group(name: str) -> tuple[str, str]:
    """Group and fold of an identifier; an example of another naming is alone in both."""
    found = _NLVR2_ID.match(name)
    return (f"{found[1]}-{found[2]}-{found[4]}", f"{found[1]}-{found[2]}") if found else (name, name)


def _label(row: dict[str, Any], where: str) -> bool | None:
    label = row.get("label")
    if label is None or isinstance(label, bool):
        return label
    said = str(label).lower()
    if said not in ("true", "false"):
        raise DataError(f"{where}: the label is {shown(label)}; expected True or False")
    return said == "true"


def _columns(row: dict[str, Any]) -> str:
    return f"it has: {', '.join(sorted(map(str, row)))[:200] or 'nothing'}"


class _Finder:
    """Where pictures lie: in the root itself, or in the folders that the data sets come with."""

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


# Pictures -------------------------------------------------------------------------------------------------------------


def read_pictures(example: Example, max_pixels: int, at_least: int | None = None) -> list[Image.Image]:
    """The K pictures of an example, RGB; `at_least` as in `images.decode`. Raises BadSample that names the file."""
    found = []
    for path in example.images:
        try:
            inside = record(example.id, str(path), example.sentence, example.root).image
            with own_fault():
                found += cut(decode(inside, max_pixels, at_least if example.boxes == 1 else None), example.boxes)
        except BadSample as error:
            raise BadSample(f"{path.name}: {error.reason}") from None
    return found


def cut(image: Image.Image, boxes: int) -> list[Image.Image]:
    """A wide picture -> its boxes: squares of its height, evenly spread from its left edge to its right one."""
    if boxes == 1:
        return [image]
    side = min(image.height, image.width // boxes)
    lefts = [round(k * (image.width - side) / (boxes - 1)) for k in range(boxes)]
    return [image.crop((left, 0, left + side, image.height)) for left in lefts]


@dataclass
class Sample:
    """One example, ready to be put in a batch."""

    image: Tensor
    """(K, 3, S, S) float32."""
    pieces: list[int]
    """[CLS], the sentence's word pieces, [SEP]."""
    label: int
    key: str
    bad: list[Bad] = field(default_factory=list)
    """Samples that were tried before this one."""


class PictureSentencePairs(Pairs):
    """Training examples by draw; pictures may change places where the sentence does not tell them by their order."""

    def __init__(
        self, sources: Sequence[Sentences], transform: Callable, tokenizer: Tokenizer, config: DataConfig, seed: int
    ) -> None:
        """Raises DataError when there is nothing to draw from, a label is missing, or no picture is there."""
        if len({source.count for source in sources}) > 1:
            raise DataError("the sources have different numbers of pictures in an example; train on one kind")
        for source in sources:
            source.check_some_exist()
            unknown = next((e for e in source.examples if e.label is None), None)
            if unknown:
                raise DataError(f"{unknown.key} has no label; it can be answered, not learned from")
        super().__init__(sources, transform, tokenizer, config, seed)

    def make(self, record: Example, key: tuple[int, ...]) -> Sample:
        """Cut, put in order, augment and tokenize, all keyed. Raises BadSample."""
        pictures = read_pictures(record, self.config.max_pixels, self.transform.at_least)
        sentence = clean_caption(record.sentence, self.config.max_words)
        sided = is_sided(sentence)
        if not sided and not _PLACES.search(sentence):
            pictures = _shuffled(pictures, mix(_ORDER, *key))
        # Each picture is augmented by itself, and none is mirrored where the sentence says left or right.
        with own_fault():
            views = [self.transform(p, _AUGMENT + 10 * k, *key, sided=sided) for k, p in enumerate(pictures)]
        pieces = self.tokenizer.pieces(sentence, self.config.max_tokens)
        return Sample(torch.stack(views), pieces, int(bool(record.label)), record.key)

    def collate(self, samples: Sequence[Sample]) -> SentenceBatch:
        return make_batch(samples, self.tokenizer)

    def probe(self) -> list[str]:
        texts = [e.sentence for s in self.sources for e in s.examples[:: max(1, len(s) // 100)]]
        return [clean_question(text, self.config.max_words) for text in texts]  # which takes any text


def make_batch(samples: Sequence[Sample], tokenizer: Tokenizer) -> SentenceBatch:
    """B samples -> one SentenceBatch, texts padded to the longest."""
    ids, keep = tokenizer.pad([s.pieces for s in samples])
    labels = torch.tensor([s.label for s in samples])
    bad = [b for s in samples for b in s.bad]
    return SentenceBatch(torch.stack([s.image for s in samples]), ids, keep, labels, [s.key for s in samples], bad)


def _shuffled(pictures: list[Image.Image], key: int) -> list[Image.Image]:
    rest, order = list(pictures), []
    while rest:
        order.append(rest.pop(key % len(rest)))
        key //= 7
    return order
