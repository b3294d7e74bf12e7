"""Dialogues about images in the format of VisDial v1.0, and the rows of text that a model reads of them.

Some rounds of a dialogue, with the right answer and some wrong ones each, are a sample.

A row is [ENC] question [SEP] answer [SEP], then the earlier rounds, the latest first, each ending in [SEP]; the oldest
rounds are left out if there is no room. B dialogues, K rows of each, T text tokens, S image side in pixels.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip.data.draws import Prepare, Sample
from blip.data.formats.sources import record
from blip.data.images import model_input
from blip.data.paths import check_name, check_spec
from blip.data.settings import DataConfig, Dialogues
from blip.errors import BadSample, DataError, shown
from blip.keyed import Purpose, mix
from blip.objectives.batch import DialogueBatch
from blip.text import clean_caption, clean_question, is_sided
from blip.tokenizer import Tokenizer


@dataclass(frozen=True)
class Round:
    """A question with the answers to choose from, all as numbers of texts."""

    question: int
    answer: int | None
    """Index of the given answer; None if it is to be predicted."""
    options: np.ndarray
    """Candidate answers, int32; empty for rounds that serve only as history."""
    true: int | None
    """Position of the right answer among the candidates."""


@dataclass(frozen=True)
class Conversation:
    """A stored dialogue about an image."""

    image_id: int | str
    image: Path
    caption: str
    rounds: tuple[Round, ...]
    where: str
    """Name `file:dialogue`, for messages."""
    relevance: tuple[int, tuple[float, ...]] | None = None
    """A round's number, from 0, and the relevance of each of its candidates, 0 to 1."""


class Conversations:
    """The dialogues of one file, by number; a source of `blip.data.draws.Draws`."""

    kind = "human"

    def __init__(self, config: Dialogues) -> None:
        """Read the files. DataError names the file, dialogue and round at fault, and what was expected."""
        self.config, self.weight = config, config.weight
        self.path = Path(check_spec(config.path))
        self.root = Path(os.path.abspath(check_spec(config.image_root) if config.image_root else self.path.parent))
        if not self.root.is_dir():
            raise DataError(f"source {config.path}: image_root {self.root} is not a folder")
        value = _load(self.path)
        data = value.get("data") if isinstance(value, dict) else None
        if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in _LISTS):
            raise DataError(f"{self.path}: expected VisDial v1.0, an object with data.questions, .answers and .dialogs")
        self.split = str(value.get("split", ""))
        self.questions, self.answers = (_texts(self.path, name, data[name]) for name in ("questions", "answers"))
        find = _Finder(self.root, self.split)
        read = _Reader(self.path, len(self.questions), len(self.answers), find)
        self.dialogues = [read(number, row) for number, row in enumerate(data["dialogs"])]
        if not self.dialogues:
            raise DataError(f"{self.path}: no dialogues")
        _refuse_repeated(self.path, self.dialogues)
        if config.relevance:
            self.dialogues = _with_relevance(Path(check_spec(config.relevance)), self.dialogues)

    @cached_property
    def wording(self) -> Wording:
        """Similarity in wording of its answers."""
        return Wording(self.answers)

    def check_some_exist(self) -> None:
        """Raise DataError if none of some images, evenly spread, exists: a wrong image_root is found at the start."""
        step = max(1, len(self) // 16)
        if not any(dialogue.image.exists() for dialogue in self.dialogues[::step]):
            raise DataError(
                f"source {self.config.path}: none of its images exists; looked for {self.dialogues[0].image}. "
                "Set image_root to the folder that holds them"
            )

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, row: int) -> tuple[Conversations, Conversation]:
        return self, self.dialogues[row]

    def key(self, row: int) -> str:
        return self.dialogues[row].where

    def identity(self) -> str:
        return json.dumps([self.path.name, self.path.stat().st_size, self.config.weight, len(self)])


_LISTS = ("questions", "answers", "dialogs")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); is the file cut off?") from None


def _texts(path: Path, name: str, texts: list) -> list[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{path}: {name}[{number}] is {shown(text)}, not a text")
    return texts


def _refuse_repeated(path: Path, dialogues: Sequence[Conversation]) -> None:
    first: dict[Any, str] = {}
    for dialogue in dialogues:
        if dialogue.image_id in first:
            raise DataError(
                f"{path}: duplicate image {dialogue.image_id}, in {first[dialogue.image_id]} and "
                f"{dialogue.where}; expected one dialogue an image"
            )
        first[dialogue.image_id] = dialogue.where


class _Reader:
    """One dialogue of the file -> Conversation."""

    def __init__(self, path: Path, questions: int, answers: int, find: _Finder) -> None:
        self.path, self.questions, self.answers, self.find = path, questions, answers, find

    def __call__(self, number: int, row: Any) -> Conversation:
        where = f"{self.path}: dialogs[{number}]"
        needed = ("image_id", "caption", "dialog")
        if not isinstance(row, dict) or not all(name in row for name in needed):
            raise DataError(f"{where} lacks one of {', '.join(needed)}")
        image_id, caption, rounds = (row[name] for name in needed)
        if isinstance(image_id, bool) or not isinstance(image_id, int | str) or not isinstance(caption, str):
            raise DataError(f"{where}: expected a number for image_id and a text for caption")
        if not isinstance(rounds, list) or not rounds:
            raise DataError(f"{where}, image {image_id}: expected a list of rounds in 'dialog'")
        image = self.find(where, image_id, row.get("image"))
        parts = tuple(self._round(f"{where}, image {image_id}, round {n + 1}", r) for n, r in enumerate(rounds))
        return Conversation(image_id, image, caption, parts, f"{self.path.name}:{number}")

    def _round(self, where: str, row: Any) -> Round:
        if not isinstance(row, dict) or "question" not in row:
            raise DataError(f"{where} has no question")
        question = _index(where, "question", row["question"], self.questions)
        answer = None if row.get("answer") is None else _index(where, "answer", row["answer"], self.answers)
        options = row.get("answer_options", [])
        if not isinstance(options, list):
            raise DataError(f"{where}: answer_options is {str(options)[:40]!r}; expected a list of numbers")
        for option in options:
            _index(where, "answer_options", option, self.answers)
        true = row.get("gt_index")
        if true is not None:
            true = _index(where, "gt_index", true, len(options))
        elif answer is not None and answer in options:
            true = options.index(answer)
        return Round(question, answer, np.array(options, np.int32), true)


def _index(where: str, name: str, value: Any, size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise DataError(f"{where}: {name} has {shown(value)}; expected a number from 0 to {size - 1}")
    return value


def _with_relevance(path: Path, dialogues: Sequence[Conversation]) -> list[Conversation]:
    """Dense annotations: [{image_id, round_id, gt_relevance}], rounds from 1; `relevance` in the training sample."""
    rows = _load(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of {{image_id, round_id, gt_relevance}}")
    at = {dialogue.image_id: number for number, dialogue in enumerate(dialogues)}
    annotated, left = list(dialogues), 0
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        values = row.get("gt_relevance", row.get("relevance")) if isinstance(row, dict) else None
        named = isinstance(row, dict) and isinstance(row.get("image_id"), int | str)
        if not named or not isinstance(values, list) or not isinstance(row.get("round_id"), int):
            raise DataError(f"{where}: expected image_id, round_id and gt_relevance")
        if row["image_id"] not in at:
            left += 1
            continue
        dialogue, index = annotated[at[row["image_id"]]], row["round_id"] - 1
        if not 0 <= index < len(dialogue.rounds) or len(values) != len(dialogue.rounds[index].options):
            raise DataError(
                f"{where}: {len(values)} values for round {row['round_id']} of image {row['image_id']}; expected one "
                "for each of its candidates"
            )
        if not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values):
            raise DataError(f"{where}: expected numbers from 0 to 1 in gt_relevance")
        annotated[at[row["image_id"]]] = replace(dialogue, relevance=(index, tuple(map(float, values))))
    if left == len(rows):
        raise DataError(f"{path}: none of its images is in the dialogues; is it of another split?")
    return annotated


class _Finder:
    """An image by its number, as VisDial's folders and COCO's name it, or by the path that a dialogue gives."""

    def __init__(self, root: Path, split: str) -> None:
        visdial = f"VisualDialog_{split}"
        self.root = root
        self._names = [
            *(f"{folder}{visdial}_NUMBER.jpg" for folder in ("", f"{visdial}/", f"images/{visdial}/")),
            *(
                f"{folder}COCO_{part}_NUMBER.jpg"
                for part in ("train2014", "val2014")
                for folder in ("", f"{part}/", f"images/{part}/")
            ),
        ]
        self._at = 0

    def __call__(self, where: str, image_id: int | str, image: Any) -> Path:
        if image is None and not isinstance(image_id, int):
            image = f"{image_id}.jpg"
        if image is not None:
            reason = check_name(image, self.root) if isinstance(image, str) else f"image {shown(image)} is not a path"
            if reason:
                raise DataError(f"{where}: {reason}")
            return self.root / image
        # Where the last one was, and then wherever else one may be: the training set is COCO's train and val.
        order = [self._at, *(k for k in range(len(self._names)) if k != self._at)]
        for k in order:
            path = self._path(k, image_id)
            if path.exists():
                self._at = k
                return path
        return self._path(self._at, image_id)

    def _path(self, k: int, number: int) -> Path:
        return self.root / self._names[k].replace("NUMBER", f"{number:012d}")


def read_image(
    dialogue: Conversation,
    root: Path,
    max_pixels: int,
    transform: Callable[[Image.Image], Tensor],
    at_least: int | None = None,
) -> Tensor:
    """What `transform` makes of the image, RGB; `at_least` as in `images.decode`. Raises BadSample with the file."""
    try:
        inside = record(dialogue.where, str(dialogue.image), "", root).image
        return model_input(inside, max_pixels, transform, at_least)
    except BadSample as error:
        raise BadSample(f"{dialogue.image.name}: {error.reason}") from None


# Text -----------------------------------------------------------------------------------------------------------------


class DialogueRows:
    """Model inputs of a dialogue: each text is tokenized once and joined as often as needed."""

    def __init__(self, source: Conversations, dialogue: Conversation, tokenizer: Tokenizer, config: DataConfig) -> None:
        self.source, self.dialogue, self.tokenizer, self.config = source, dialogue, tokenizer, config
        self._known: dict[str, list[int]] = {}

    def caption(self) -> list[int]:
        """[CLS] caption [SEP]. Raises BadSample if it has no words."""
        words = clean_caption(self.dialogue.caption, self.config.max_words)
        return self.tokenizer.pieces(words, self.config.max_words + 2)

    def round(self, number: int, answers: Sequence[int]) -> list[list[int]]:
        """One row for each of some answers to the question of a round."""
        rounds, source = self.dialogue.rounds, self.source
        question = self._pieces(source.questions[rounds[number].question])
        before = self._earlier(number)
        return [self._row(question, self._pieces(source.answers[a]), before) for a in answers]

    def _earlier(self, number: int) -> list[list[int]]:
        """The earlier rounds, the latest first; a round without a known answer has its question only."""
        earlier = []
        for one in reversed(self.dialogue.rounds[:number]):
            answer = [] if one.answer is None else self._pieces(self.source.answers[one.answer])
            earlier.append([*self._pieces(self.source.questions[one.question]), *answer, self.tokenizer.sep_id])
        return earlier

    def _row(self, question: list[int], answer: list[int], before: Sequence[list[int]]) -> list[int]:
        sep, room = self.tokenizer.sep_id, self.config.max_tokens
        answer = answer[: room - 3]
        row = [self.tokenizer.enc_id, *question[: room - 3 - len(answer)], sep, *answer, sep]
        for exchange in before:
            if len(row) + len(exchange) > room:
                break
            row += exchange
        return row

    def _pieces(self, text: str) -> list[int]:
        if text not in self._known:
            words = clean_question(text, self.config.max_words)
            self._known[text] = self.tokenizer.pieces(words, self.config.max_tokens)[1:-1]
        return self._known[text]


# Training -------------------------------------------------------------------------------------------------------------


def open_dialogues(config: DataConfig) -> list[Conversations]:
    """The sources of a run, by number.

    Raises DataError for streaming, or when a dialogue teaches nothing or none of the images is there.
    """
    if config.streaming:
        raise DataError(
            "data.streaming does not read dialogues, as VisDial's file has the texts of all dialogues in one list: "
            "set data.streaming to false"
        )
    sources = [Conversations(source) for source in config.sources]
    for source in sources:
        source.check_some_exist()
        for dialogue in source.dialogues:
            if not _teaching(dialogue):
                raise DataError(f"{source.path}: image {dialogue.image_id}: no round has its right answer marked")
    return sources


@dataclass
class PrepareDialogues(Prepare):
    """Choose rounds and wrong answers, decode, augment and tokenize.

    A sample's texts are the caption and, of each round, a row with the right answer, then rows with wrong ones.
    """

    rounds: int
    """Number of rounds of a dialogue in a sample."""
    negatives: int
    """Number of wrong answers per right one."""
    hard_negatives: int = 0
    """Number of those that are hard negatives: drawn from twice as many that are worded most like the right one."""

    def __call__(self, record: tuple[Conversations, Conversation], key: tuple[int, ...]) -> Sample:
        source, dialogue = record
        rows, texts = DialogueRows(source, dialogue, self.tokenizer, self.config), []
        for n, number in enumerate(_drawn(_teaching(dialogue), self.rounds, mix(Purpose.ROUNDS, *key))):
            one = dialogue.rounds[number]
            right = source.answers[one.options[one.true]]
            negatives = [option for option in one.options if source.answers[option] != right]
            if not negatives:
                raise BadSample(f"round {number + 1} has no false answer")
            true, hard = one.options[one.true], []
            if self.hard_negatives:
                hard = source.wording.most_like(true, negatives, 2 * self.hard_negatives)
                hard = _drawn(hard, min(self.hard_negatives, len(hard)), mix(Purpose.HARD_NEGATIVES, n, *key))
            others = [option for option in negatives if option not in hard] or negatives
            others = _drawn(others, self.negatives - len(hard), mix(Purpose.NEGATIVES, n, *key))
            texts += rows.round(number, [true, *hard, *others])
        sided = any(map(is_sided, _all_texts(source, dialogue)))

        def augment(image: Image.Image) -> Tensor:
            return self.transform(image, Purpose.DIALOGUE_AUGMENTATION, *key, sided=sided)

        image = read_image(dialogue, source.root, self.config.max_pixels, augment, self.transform.at_least)
        return Sample(image, [rows.caption(), *texts], dialogue.where)

    def collate(self, samples: Sequence[Sample]) -> DialogueBatch:
        caption_ids, caption_keep = self.tokenizer.pad([s.texts[0] for s in samples])
        ids, keep = self.tokenizer.pad([row for s in samples for row in s.texts[1:]])
        bad = [b for s in samples for b in s.bad]
        image = torch.stack([s.images for s in samples])
        keys = [s.key for s in samples]
        return DialogueBatch(image, caption_ids, caption_keep, ids, keep, 1 + self.negatives, keys, bad)

    def images(self, record: tuple[Conversations, Conversation]) -> Sequence[Path]:
        return [record[1].image]

    def texts(self, record: tuple[Conversations, Conversation]) -> list[str]:
        return [clean_question(text, self.config.max_words) for text in _all_texts(*record)]

    def suffix(self) -> str:
        return f"-{self.rounds}-{self.negatives}" + f"-{self.hard_negatives}" * bool(self.hard_negatives)


class Wording:
    """Similarity of answers by shared words, weighted by rarity."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = answers
        counts = Counter(word for answer in answers for word in set(answer.lower().split()))
        self.weights = {word: math.log(1 + len(answers) / count) for word, count in counts.items()}

    def most_like(self, true: int, others: Sequence[int], count: int) -> list[int]:
        """The candidates most like an answer, by the weight of shared words over that of all words of both."""
        own = set(self.answers[true].lower().split())
        likeness = {}
        for other in others:
            words = set(self.answers[other].lower().split())
            likeness[other] = self._weight(own & words) / max(self._weight(own | words), 1e-9)
        return sorted(likeness, key=lambda other: (-likeness[other], other))[:count]

    def _weight(self, words: set[str]) -> float:
        return math.fsum(self.weights[word] for word in words)  # in any order: that of a set differs between processes


def _teaching(dialogue: Conversation) -> list[int]:
    """Rounds whose right answer is known among others."""
    return [n for n, one in enumerate(dialogue.rounds) if one.true is not None and len(one.options) > 1]


def _all_texts(source: Conversations, dialogue: Conversation) -> list[str]:
    """All texts of the dialogue."""
    answers = [source.answers[r.answer] for r in dialogue.rounds if r.answer is not None]
    return [dialogue.caption, *answers, *(source.questions[r.question] for r in dialogue.rounds)]


def _drawn(items: Sequence[int], count: int, key: int) -> list[int]:
    """Draw `count` items, none twice before all have been drawn."""
    drawn: list[int] = []
    rest: list[int] = []
    for n in range(count):
        rest = rest or list(items)
        drawn.append(rest.pop(mix(key, n) % len(rest)))
    return drawn
