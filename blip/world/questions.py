"""Questions about scenes of the synthetic world, each with ten annotators' answers, in the format of VQA v2.

    python -m blip.world.questions --out runs/world --count 20000
    python -m blip.world.questions --out runs/world --split val --count 500

Written beside the images and captions of `blip.world.files`, which are created first if missing. Each scene has one
question of each of `KINDS`. Most annotators give the true answer; some use a synonym or are mistaken, but never so many
that the true answer scores less than 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip.world import files as world_files
from blip.world.files import command_line, progress, publish
from blip.world.scene import (
    COLOURS,
    HELD_OUT,
    OPPOSITE,
    PLACES,
    RELATIONS,
    SHAPES,
    Dice,
    Scene,
    Split,
    Thing,
    relations_of,
    scene,
)

ANNOTATORS = 10
KINDS = ("colour", "shape", "count", "relation", "yes/no")
"""Kinds of question, in the order in which each scene's questions are numbered."""
_MOST_MISTAKEN = 2
"""Most annotators who give a false answer to one question."""
_OTHER_WORDS = {"moon": "crescent", "circle": "disc", "middle": "centre"}
_MISTAKES = {
    "red": "orange", "orange": "red", "yellow": "orange", "green": "blue", "blue": "purple", "purple": "pink",
    "white": "pink", "pink": "purple", "circle": "ring", "ring": "circle", "square": "cross", "cross": "star",
    "star": "cross", "triangle": "heart", "heart": "triangle", "moon": "ring", "yes": "no", "no": "yes",
    "0": "1", "1": "2", "2": "3", "3": "2",
    **{place: PLACES[(i + 1) % len(PLACES)] for i, place in enumerate(PLACES)},
}  # fmt: skip
"""Answer of a mistaken annotator for each true answer."""
_TO = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
_PLURAL = {"cross": "crosses", **{shape: f"{shape}s" for shape in SHAPES if shape != "cross"}}


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene."""

    question: str
    answer: str
    """True answer."""
    answers: list[str]
    """Answers of ten annotators."""
    kind: str
    """Kind of question: one of `KINDS`."""
    question_type: str
    """First words of the question, by which VQA v2 groups questions."""

    @property
    def answer_type(self) -> str:
        """VQA v2's type of the answer: yes/no, number or other."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "number" if self.answer.isdigit() else "other"


def questions(scene: Scene) -> list[SceneQuestion]:
    """One question of each of `KINDS`, all answerable from the image."""
    dice = Dice("vqa", scene.seed, scene.split, scene.i)
    pairs = []
    for kind in KINDS:
        start, rest, answer = _QUESTION_MAKERS[kind](dice, scene)
        pairs.append(SceneQuestion(f"{start} {rest}?", answer, _annotated(dice, answer), kind, start))
    return pairs


def _annotated(dice: Dice, answer: str) -> list[str]:
    answers = [answer] * ANNOTATORS
    mistaken = dice.below(_MOST_MISTAKEN + 1) if dice.chance(0.4) else 0
    answers[:mistaken] = [_MISTAKES[answer]] * mistaken
    if answer in _OTHER_WORDS and dice.chance(0.5):
        others = dice.between(1, 3)
        answers[mistaken : mistaken + others] = [_OTHER_WORDS[answer]] * others
    return dice.shuffled(answers)


def _one(things: list[Thing] | tuple[Thing, ...], name: str) -> list[Thing]:
    """Things whose colour, or shape, no other thing shares."""
    return [t for t in things if sum(getattr(t, name) == getattr(o, name) for o in things) == 1]


def _name(dice: Dice, scene: Scene, thing: Thing) -> str:
    """A name that fits this thing only, often the shortest one."""
    names = [f"{thing.colour} {thing.shape}"]
    names += [thing.shape] * (2 * (thing in _one(scene.things, "shape")))
    names += [f"{thing.colour} thing"] * (thing in _one(scene.things, "colour"))
    return dice.choice(names)


def _colour(dice: Dice, scene: Scene) -> tuple[str, str, str]:
    things = _one(scene.things, "shape")
    if things:
        thing = dice.choice(things)
        return "what colour is", f"the {thing.shape}", thing.colour
    # Things of one shape differ in colour, so the place tells them apart.
    thing = dice.choice(scene.things)
    return "what colour is", f"the {thing.shape} at the {thing.place}", thing.colour


def _shape(dice: Dice, scene: Scene) -> tuple[str, str, str]:
    things = _one(scene.things, "colour")
    if things:
        thing = dice.choice(things)
        return "what shape is", f"the {thing.colour} thing", thing.shape
    thing = dice.choice(scene.things)
    return "what shape is", f"the {thing.colour} thing at the {thing.place}", thing.shape


def _count(dice: Dice, scene: Scene) -> tuple[str, str, str]:
    shown = dice.choice(scene.things)
    what: Callable[[Thing], bool]
    if dice.chance(0.4):
        return "how many", "shapes are there", str(len(scene.things))
    if dice.chance(0.5):
        colour = shown.colour if dice.chance(0.7) else dice.choice(tuple(COLOURS))
        words, what = f"{colour} shapes are there", lambda t: t.colour == colour
    else:
        shape = shown.shape if dice.chance(0.7) else dice.choice(SHAPES)
        words, what = f"{_PLURAL[shape]} are there", lambda t: t.shape == shape
    return "how many", words, str(sum(map(what, scene.things)))


def _relation(dice: Dice, scene: Scene) -> tuple[str, str, str]:
    """Ask what is left of, right of, above or below a thing, or where the only thing is."""
    candidates = []
    for thing in scene.things:
        for relation in RELATIONS:
            there = [o for o in scene.things if o is not thing and relation in relations_of(o, thing)]
            if len(there) == 1:
                candidates.append((thing, relation, there[0]))
    if not candidates:
        thing = dice.choice(scene.things)
        return "where is", f"the {_name(dice, scene, thing)}", thing.place
    thing, relation, there = dice.choice(candidates)
    about = f"{_TO[relation]} the {_name(dice, scene, thing)}"
    if dice.chance(0.5):
        return "what shape is", about, there.shape
    return "what colour is", f"the thing {about}", there.colour


def _yes_no(dice: Dice, scene: Scene) -> tuple[str, str, str]:
    """Ask yes or no with equal probability; a false statement is false in one word."""
    true = dice.chance(0.5)
    thing = dice.choice(scene.things)
    pairs = [(a, b) for a in scene.things for b in scene.things if a is not b]
    if pairs and dice.chance(0.5):
        a, b = dice.choice(pairs)
        relation = dice.choice(relations_of(a, b))
        stated = relation if true else OPPOSITE[relation]
        return "is the", f"{_name(dice, scene, a)} {_TO[stated]} the {_name(dice, scene, b)}", _yes_or_no(true)
    pair = (thing.colour, thing.shape)
    present = {(t.colour, t.shape) for t in scene.things}
    if not true:
        never = frozenset() if scene.split == "composition" else HELD_OUT
        while pair in present or pair in never:
            other = dice.choice(tuple(COLOURS)), dice.choice(SHAPES)
            pair = (other[0], thing.shape) if dice.chance(0.5) else (thing.colour, other[1])
    article = "an" if pair[0][0] in "aeiou" else "a"
    return "is there", f"{article} {pair[0]} {pair[1]}", _yes_or_no(true)


def _yes_or_no(true: bool) -> str:
    return "yes" if true else "no"


_QUESTION_MAKERS: dict[str, Callable[[Dice, Scene], tuple[str, str, str]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "yes/no": _yes_no,
}


# Files ----------------------------------------------------------------------------------------------------------------


def files(split: str) -> tuple[str, str]:
    """Names of the question file and the annotation file."""
    return f"questions-{split}.json", f"annotations-{split}.json"


def write(
    out: str | Path,
    split: Split = "train",
    count: int = 1000,
    seed: int = 0,
    size: int = 64,
    workers: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Write questions about the first images of a split, and the images themselves if missing.

    `questions-SPLIT.json` and `annotations-SPLIT.json` are in VQA v2's format; each question also has the path of its
    image. The same settings give the same bytes.

    Args:
        out: Folder of the images, as `blip.world.files` writes them in json format.
        split: train, val and test share no scene; composition shows colour-shape pairs that no other split has.
        count: Number of images.
        seed: Random seed of the scenes.
        size: Side of the images in pixels, if they are drawn.
        workers: Number of processes that draw.
        overwrite: Replace the questions and answers that an earlier call wrote.

    Returns:
        The files written. ValueError for invalid settings, FileExistsError if a file exists.
    """
    out = Path(out)
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    if not (out / f"{split}.json").exists():
        world_files.write(out, "json", split, count, seed, size, workers=workers)
    last = out / "images" / split / f"{scene(seed, count - 1, split).image_id}.jpg"
    if not last.exists():
        raise ValueError(
            f"{out} does not hold {count} images of split {split} and seed {seed}: {last} is missing; "
            "give the --count and --seed of its images, or another --out"
        )

    def fill(folder: Path) -> None:
        listed, annotated = [], []
        for i in progress(range(count), count, "images", f"questions {split}"):
            for one, row in _rows(seed, split, i):
                listed.append(one)
                annotated.append(row)
        about = {"info": {"description": "questions about the embedded picture world"}, "data_subtype": split}
        for name, key, rows in zip(files(split), ("questions", "annotations"), (listed, annotated), strict=True):
            (folder / name).write_text(json.dumps({**about, key: rows}))

    return publish(out, list(files(split)), fill, overwrite)


def _rows(seed: int, split: str, i: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The questions about image `i` and their annotations."""
    made = scene(seed, i, split)
    rows = []
    for number, one in enumerate(questions(made)):
        ids = {"image_id": i, "question_id": i * 1000 + number}
        answers = [
            {"answer": given, "answer_confidence": "yes", "answer_id": k} for k, given in enumerate(one.answers, 1)
        ]
        kinds = {"question_type": one.question_type, "answer_type": one.answer_type}
        question = {**ids, "image": f"images/{split}/{made.image_id}.jpg", "question": one.question}
        rows.append((question, {**ids, **kinds, "multiple_choice_answer": one.answer, "answers": answers}))
    return rows


def main(args: list[str] | None = None) -> None:
    """The command line."""
    command_line(write, args)


if __name__ == "__main__":
    main()
