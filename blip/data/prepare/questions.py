"""Questions about images with human answers, from all supported formats.

A question with its image and its answers is a sample. B questions, A answers to them, S image side in pixels.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from blip.data.draws import Prepare, Sample
from blip.data.formats.json_rows import Row, read_rows
from blip.data.formats.sources import Record, record, shard_files
from blip.data.paths import check_name, check_spec
from blip.data.prepare.captions import image_id_of
from blip.data.settings import DataConfig, ImageQuestions
from blip.data.stream import ListShards
from blip.errors import BadSample, DataError, shown
from blip.keyed import Purpose
from blip.objectives.batch import QuestionBatch
from blip.text import clean_question, is_sided
from blip.tokenizer import Tokenizer

Id = int | str
VISUAL_GENOME = 0.2
"""Weight of the answers of rows of dataset vg in the 2022 release."""
_BLOCK = 1 << 16
_LONGEST_ANSWER = 32
"""Most word pieces of an answer used for training, [DEC] and [SEP] included."""
_NAME = "{subset}/COCO_{subset}_{image_id:012d}.jpg"
"""Default path of VQA v2's images."""


class Question(NamedTuple):
    """A stored question."""

    id: Id
    text: str
    image: str
    """Path under the source's root."""
    answers: list[str]
    """Answers of the annotators, one each; empty if the data has none."""
    weight: float = 1.0
    """Total weight of the answers."""
    question_type: str = ""
    answer_type: str = ""


class Questions:
    """The questions of one source, by number; shared with workers instead of copied."""

    kind = "human"

    def __init__(self, config: ImageQuestions) -> None:
        """Read the file. DataError names the file, row and id at fault, and what was expected."""
        self.config, self.weight = config, config.weight
        self.path = Path(check_spec(config.path))
        self.root = _root(config, self.path)
        blocks, self.ids = [], []
        rows = _rows(config, self.path, self.root)
        while block := list(islice(rows, _BLOCK)):
            self.ids += [question.id for question in block]
            blocks.append(_columns(block))
        if not blocks:
            raise DataError(f"{self.path}: no questions")
        self._table = pa.concat_tables(blocks).combine_chunks()
        _refuse_repeated(self.path, self.ids)

    def check_some_exist(self) -> None:
        """Raise DataError if none of some images, evenly spread, exists: a wrong image_root is found at the start."""
        rows = np.linspace(0, len(self) - 1, min(16, len(self)), dtype=np.int64).tolist()
        names = [self._table["image"][row].as_py() for row in rows]
        if not any((self.root / name).exists() for name in names):
            raise DataError(
                f"source {self.config.path}: none of its images exists; looked for {self.root / names[0]}. "
                "Set image_root (and image_name, for images that are known by number) to where they are"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def question(self, row: int) -> Question:
        """A stored question."""
        return Question(self.ids[row], **{name: self._table[name][row].as_py() for name in _TYPES})

    def __getitem__(self, row: int) -> QuestionRecord:
        return _record(self.key(row), self.question(int(row)), self.root)

    def key(self, row: int) -> str:
        return f"{self.path.name}:{row} question {self.ids[row]}"

    def answers(self) -> Counter[str]:
        """All answers of the source, with their counts."""
        return Counter(answer for chunk in self._table["answers"].chunks for answer in chunk.flatten().to_pylist())

    def unanswered(self) -> list[int]:
        """Rows of the questions without answers."""
        lengths = np.concatenate([chunk.value_lengths() for chunk in self._table["answers"].chunks])
        return np.flatnonzero(lengths == 0).tolist()

    def identity(self) -> str:
        config = self.config
        files = [self.path, *([Path(check_spec(config.annotations))] if config.annotations else [])]
        columns = (config.image_column, config.question_column, config.answer_column, config.image_name)
        chosen = (config.weight, config.answer_weight, len(self))
        return json.dumps([columns, chosen, [(file.name, file.stat().st_size) for file in files]])


@dataclass(frozen=True)
class QuestionRecord(Record):
    """A training row; `captions` are the answers."""

    question: str
    weight: float


def _record(key: str, question: Question, root: Path) -> QuestionRecord:
    image = record(key, question.image, question.text, root).image
    return QuestionRecord(key, image, question.answers, question.text, question.weight)


class QuestionShards(ListShards):
    """The questions of lists of rows, read in sequence."""

    def __init__(self, config: ImageQuestions) -> None:
        """Raise DataError for files that cannot be read or cannot be streamed."""
        files = shard_files(config.path, "json")
        for file in files:
            if config.annotations or _is_whole(file):
                raise DataError(
                    f"source {config.path}: data.streaming reads lists of rows with question and answers, and "
                    f"{file.name} is VQA v2's or easy-VQA's: set data.streaming to false"
                )
        self._roots = {file: _root(config, file) for file in files}
        super().__init__(config, files)

    def records(self, file: Path, number: int, row: Row) -> list[QuestionRecord]:
        question = _question(self.config, number, row, f"{file}: row {number}")
        return [_record(f"{file.name}:{number} question {question.id}", question, self._roots[file])]

    def answers(self) -> Counter[str]:
        """Count answers as `Questions` does; reads all files once."""
        records = (one for file in self.files for one in self.read(file) if isinstance(one, QuestionRecord))
        return Counter(answer for one in records for answer in one.captions)


_TYPES = {
    "text": pa.large_string(),
    "image": pa.large_string(),
    "answers": pa.large_list(pa.large_string()),
    "weight": pa.float32(),
    "question_type": pa.string(),
    "answer_type": pa.string(),
}


def _columns(block: Sequence[Question]) -> pa.Table:
    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value.encode("utf-8", "ignore").decode()  # JSON may hold half a surrogate
        return [plain(part) for part in value] if isinstance(value, list) else value

    return pa.table({n: pa.array([plain(getattr(q, n)) for q in block], kind) for n, kind in _TYPES.items()})


def _root(config: ImageQuestions, path: Path) -> Path:
    if config.image_root is None:
        return Path(os.path.abspath(path.parent))
    root = Path(os.path.abspath(check_spec(config.image_root)))
    if not root.is_dir():
        raise DataError(f"source {config.path}: image_root {root} is not a folder")
    return root


def _refuse_repeated(path: Path, ids: Sequence[Id]) -> None:
    if len(set(ids)) < len(ids):
        twice = [name for name, count in Counter(ids).items() if count > 1]
        raise DataError(
            f"{path}: {len(twice)} duplicate question ids ({', '.join(map(str, twice[:5]))}); expected "
            "each once: set id_column, or give a file without them"
        )


# Formats --------------------------------------------------------------------------------------------------------------


def _rows(config: ImageQuestions, path: Path, root: Path) -> Iterator[Question]:
    """The questions of a file in any of the formats. Raises DataError."""
    if _is_whole(path):
        value = load(path)
        rows = _official(config, path, value) if isinstance(value, dict) else _easy(path, value)
    else:
        if config.annotations:
            raise DataError(
                f"{path} is a list, which has its answers in it: leave annotations {config.annotations} out"
            )
        rows = _listed(config, path)
    for number, question in enumerate(rows):
        reason = check_name(question.image, root)
        if reason:
            raise DataError(f"{path}: row {number}: {reason}")
        yield question


def _is_whole(path: Path) -> bool:
    """Whether a file is one value, VQA v2's object or easy-VQA's list of lists, and not a list of rows."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = "".join(file.read(4096).split())
        return path.suffix == ".json" and start.startswith(("[[", "{"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def load(path: Path) -> Any:
    """Read a JSON file as a whole. Raises DataError."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); is the file cut off?") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _easy(path: Path, rows: list[Any]) -> Iterator[Question]:
    """easy-VQA: [question, answer, number of the image] in images/NUMBER.png beside the file."""
    for number, row in enumerate(rows):
        kinds = [type(value) for value in row] if isinstance(row, list) else []
        if kinds != [str, str, int]:
            raise DataError(f"{path}: row {number} is {str(row)[:60]!r}; expected [question, answer, image number]")
        text, answer, image = row
        kind = "yes/no" if answer in ("yes", "no") else "other"
        yield Question(number, text, f"images/{image}.png", [answer], 1.0, " ".join(text.split()[:2]), kind)


def _official(config: ImageQuestions, path: Path, value: dict[str, Any]) -> Iterator[Question]:
    """VQA v2: {questions: [{image_id, question, question_id}]}, and {annotations: [{question_id, answers, ...}]}."""
    questions = value.get("questions")
    if not isinstance(questions, list):
        keys = ", ".join(map(str, list(value)[:8]))
        hint = "it has annotations: give it as annotations, and the file of questions as path"
        raise DataError(f"{path} has no questions ({hint if 'annotations' in value else f'it has: {keys}'})")
    subset = value.get("data_subtype")
    subset = {"test-dev2015": "test2015"}.get(subset, subset)
    answers_by_id = annotations(Path(check_spec(config.annotations))) if config.annotations else None
    weight = 1.0 if config.answer_weight is None else config.answer_weight
    unanswered = []
    for number, row in enumerate(questions):
        where = f"{path}: row {number}"
        name, text = _id(row, "question_id", where), _text(row, "question", where)
        image = _text(row, "image", where) if "image" in row else _image(config, row, subset, where)
        if answers_by_id is None:
            yield Question(name, text, image, [], weight)
            continue
        if name not in answers_by_id:
            unanswered.append(name)
            continue
        question = answers_by_id.pop(name)
        yield Question(name, text, image, question.answers, weight, question.question_type, question.answer_type)
    if unanswered or answers_by_id:
        missing, other = (", ".join(map(str, islice(names, 5))) for names in (unanswered, answers_by_id or ()))
        problems = [f"{len(unanswered)} questions of {path.name} without answers ({missing})"] * bool(unanswered)
        problems += [f"{len(answers_by_id or ())} answers to other questions ({other})"] * bool(answers_by_id)
        raise DataError(f"{config.annotations}: {' and '.join(problems)}; are they of the same split?")


def annotations(path: Path) -> dict[Id, Question]:
    """VQA v2's answers by question id. Raises DataError."""
    value = load(path)
    rows = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path} has no list of annotations; expected VQA v2's {{annotations: [...]}}")
    questions: dict[Id, Question] = {}
    for number, row in enumerate(rows):
        where = f"{path}: annotation {number}"
        name = _id(row, "question_id", where)
        if name in questions:
            raise DataError(f"{where}: duplicate question {name}")
        answers = _answers(row.get("answers"), where)
        if not answers:
            raise DataError(f"{where} (question {name}) has no answers")
        kinds = [str(row.get(key) or "") for key in ("question_type", "answer_type")]
        questions[name] = Question(name, "", "", answers, 1.0, *kinds)
    return questions


def _image(config: ImageQuestions, row: dict[str, Any], subset: Any, where: str) -> str:
    number = _id(row, "image_id", where)
    if config.image_name is None and not isinstance(subset, str):
        raise DataError(
            f"{where}: only the number of its image is given, and the file has no data_subtype: set image_name, such "
            "as 'val2014/COCO_val2014_{image_id:012d}.jpg'"
        )
    try:
        return (config.image_name or _NAME).format(image_id=number, subset=subset)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{where}: image_name {config.image_name!r} does not go with {number!r}: {error!r}") from None


def _listed(config: ImageQuestions, path: Path) -> Iterator[Question]:
    """A list or lines of {image, question, answer}: the 2022 release's, and others by their columns."""
    for number, row in read_rows(path):
        yield _question(config, number, row, f"{path}: row {number}")


def _question(config: ImageQuestions, number: int, row: Row, where: str) -> Question:
    """A row of such a list. Raises DataError."""
    column = "answers" if config.answer_column not in row and "answers" in row else config.answer_column
    weight = config.answer_weight
    if weight is None:
        weight = VISUAL_GENOME if row.get("dataset") == "vg" else 1.0
    name = _id(row, config.id_column, where) if config.id_column in row else number
    kinds = [str(row.get(key) or "") for key in ("question_type", "answer_type")]
    text, image = _text(row, config.question_column, where), _text(row, config.image_column, where)
    return Question(name, text, image, _answers(row.get(column), where), weight, *kinds)


def _text(row: Any, key: str, where: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        have = ", ".join(map(str, row))[:200] if isinstance(row, dict) else f"it is {str(row)[:40]!r}"
        raise DataError(f"{where} has no text in {key!r} (it has: {have}); set the column that holds it")
    return value


def _id(row: Any, key: str, where: str) -> Id:
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where} has no id in {key!r}: expected a number or a text, found {shown(value)}")
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _answers(value: Any, where: str) -> list[str]:
    """An answer, a list of them, or of VQA v2's {answer, answer_confidence}."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    answers = [one.get("answer") if isinstance(one, dict) else one for one in values]
    for one in answers:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise DataError(f"{where}: an answer is {shown(one)}; expected a text")
    return [str(one) for one in answers]


def read_answers(path: Path) -> list[str]:
    """Read candidate answers: a JSON list, like the release's answer_list.json, or one per line. Raises DataError."""
    if path.suffix == ".json":
        answers = load(path)
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{path} is not a list of texts; expected answers to choose from")
    else:
        try:
            answers = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a list of answers: {error}") from None
    answers = [answer for answer in answers if answer.strip()]
    if not answers:
        raise DataError(f"{path} has no answers")
    return answers


# Training -------------------------------------------------------------------------------------------------------------


def open_questions(config: DataConfig) -> list[Questions] | list[QuestionShards]:
    """The sources of a run, by number or as shards.

    Raises DataError when a question has no answer to learn from, or none of the images is there.
    """
    if config.streaming:
        return [QuestionShards(source) for source in config.sources]
    sources = [Questions(source) for source in config.sources]
    for source in sources:
        source.check_some_exist()
        if bare := source.unanswered():
            raise DataError(
                f"{source.key(bare[0])} and {len(bare) - 1} others have no answers to learn from: "
                "give annotations, or set answer_column"
            )
    return sources


class PrepareQuestions(Prepare):
    """Decode, augment and tokenize: a sample's texts are the question and its answers, its labels their weights."""

    def __call__(self, record: QuestionRecord, key: tuple[int, ...]) -> Sample:
        if not record.captions:
            raise BadSample("the question has no answer to learn from")
        question = clean_question(record.question, self.config.max_words)
        if not question:
            raise BadSample(f"the question has no words: {record.question[:40]!r}")
        sided = is_sided(question) or any(is_sided(answer) for answer in record.captions)
        image = self.image(record.image, Purpose.QUESTION_AUGMENTATION, *key, sided=sided)
        pieces = self.tokenizer.pieces(question, self.config.max_tokens)
        answers = weighed(record.captions, record.weight, self.tokenizer)
        if not answers:
            raise BadSample(f"no answer of 1 to {_LONGEST_ANSWER - 2} word pieces: {record.captions[0][:40]!r}")
        texts, weights = [pieces, *map(list, answers)], list(answers.values())
        return Sample(image, texts, record.key, weights, image_id_of(record))

    def collate(self, samples: Sequence[Sample]) -> QuestionBatch:
        ids, keep = self.tokenizer.pad([s.texts[0] for s in samples])
        answer_ids, answer_keep = self.tokenizer.pad([answer for s in samples for answer in s.texts[1:]])
        return QuestionBatch(
            image=torch.stack([s.images for s in samples]),
            ids=ids,
            keep=keep,
            keys=[s.key for s in samples],
            bad=[b for s in samples for b in s.bad],
            image_ids=torch.tensor([s.image_id for s in samples]),
            answer_ids=answer_ids,
            answer_keep=answer_keep,
            weights=torch.tensor([weight for s in samples for weight in s.labels]),
            question=torch.tensor([i for i, s in enumerate(samples) for _ in s.labels]),
        )

    def texts(self, record: QuestionRecord) -> list[str]:
        return [clean_question(record.question, self.config.max_words), *record.captions[:1]]


def weighed(answers: Sequence[str], weight: float, tokenizer: Tokenizer) -> dict[tuple[int, ...], float]:
    """Answers of a question as word pieces, each once, weighed by how many annotators gave it; `weight` in all.

    Answers that are spelt with the same pieces are one. Those without words, or of more than 32 pieces, are left out.
    """
    weights: dict[tuple[int, ...], float] = {}
    for answer in answers:
        pieces = tuple(tokenizer.pieces(answer, _LONGEST_ANSWER + 1))
        if 2 < len(pieces) <= _LONGEST_ANSWER:
            weights[pieces] = weights.get(pieces, 0.0) + weight / len(answers)
    return weights
