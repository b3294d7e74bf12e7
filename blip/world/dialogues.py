"""Dialogues about scenes of the synthetic world: ten rounds of question and answer, in the format of VisDial v1.0.

    python -m blip.world.dialogues --out runs/world-dialogue --count 2000

Some questions are about "it", the thing mentioned last, and cannot be answered without the history. Each round has 100
candidate answers; the relevance of each follows from the scene and is known for every round.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blip.world import files
from blip.world.files import command_line, progress, publish
from blip.world.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PLACES,
    RADII,
    RELATIONS,
    SHAPES,
    Dice,
    Scene,
    Split,
    Thing,
    draw,
    relations_of,
    scene,
)
from blip.world.text import captions

ROUNDS = 10
CANDIDATES = 100
_IT = 0.5
"""Probability that a question is about "it", once a thing has been mentioned."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

_FORMS: dict[str, tuple[str, ...]] = {
    "yes": ("yes", "yes it is", "yes there is", "yes that is true"),
    "no": ("no", "no it is not", "no there is not", "no that is not true"),
    "colour": ("{}", "it is {}", "the colour is {}"),
    "shape": ("{a}", "it is {a}", "i see {a}"),
    "size": ("{}", "it is {}", "a {} one"),
    "place": ("{at}", "it is {at}", "you see it {at}"),
    "count": ("{}", "there {be} {}", "i see {}"),
    "background": ("{}", "it is {}", "a {} background"),
}
"""Wordings of each kind of answer: short, as a sentence, and another."""
_VALUES: dict[str, tuple[str, ...]] = {
    "yes": ("",),
    "no": ("",),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(RADII),
    "place": PLACES,
    "count": _NUMBERS,
    "background": BACKGROUNDS,
}
_NEAR = 0.5
"""Relevance of half a place: "at the top" for a thing at the top left."""


@dataclass(frozen=True)
class Reply:
    """An answer: its meaning (kind and value) and its wording."""

    kind: str
    value: str
    text: str


def _answers() -> tuple[Reply, ...]:
    replies = []
    for kind, values in _VALUES.items():
        for value in values:
            article = "an" if value[:1] in tuple("aeiou") else "a"
            for form in _FORMS[kind]:
                be = "is" if value == "one" else "are"
                text = form.format(value, a=f"{article} {value}", at=f"{_at(value)} the {value}", be=be)
                replies.append(Reply(kind, value, text))
    return tuple(replies)


def _at(place: str) -> str:
    return {"left": "on", "right": "on", "middle": "in"}.get(place, "at")


ANSWERS = _answers()
"""All possible answers; no two have the same wording."""
_SETS = [("yes", "no"), *((kind,) for kind in _VALUES if kind not in ("yes", "no"))]
_LIKE = {kind: [a for a in ANSWERS if a.kind in kinds] for kinds in _SETS for kind in kinds}
_UNLIKE = {kind: [a for a in ANSWERS if a.kind not in kinds] for kinds in _SETS for kind in kinds}
"""Answers that fit the same questions as one of the kind, and all others."""


@dataclass(frozen=True)
class Turn:
    """A question, its answer, the candidates, and the relevance of each candidate."""

    question: str
    answer: Reply
    options: tuple[Reply, ...]
    relevance: tuple[float, ...]
    kind: str
    """Kind of question."""
    by_history: bool
    """Whether the question is about "it"."""


@dataclass(frozen=True)
class Talk:
    """A dialogue about a scene."""

    scene: Scene
    caption: str
    turns: tuple[Turn, ...]


def dialogue(one: Scene) -> Talk:
    """Ten rounds about a scene, no question asked twice; a pure function of the scene."""
    dice = Dice("dialogue", one.seed, one.split, one.i)
    caption = dice.choice(captions(one))
    manner = dice.below(3)
    turns: list[Turn] = []
    subjects: set[tuple[str, str]] = set()
    spoken: Thing | None = None
    while len(turns) < ROUNDS:
        about_it = spoken is not None and dice.chance(_IT)
        kind = dice.choice(tuple(_OF_IT if about_it else _OF_SCENE))
        question_of = _OF_IT[kind] if about_it else _OF_SCENE[kind]
        turn = question_of(dice, one, spoken)
        if turn is None:
            continue
        question, (meant, value), thing = turn
        # "what colour is it" may be asked again once "it" is another thing.
        subject = (question, str(one.things.index(spoken)) if about_it else "")
        # Do not ask for what the last answer has just said.
        if subject in subjects or (about_it and kind == turns[-1].kind):
            continue
        subjects.add(subject)
        turns.append(Turn(question, *_answered(dice, meant, value, kind, manner), kind, about_it))
        spoken = thing or spoken
    return Talk(one, caption, tuple(turns))


def _answered(
    dice: Dice, kind: str, value: str, subject: str, manner: int
) -> tuple[Reply, tuple[Reply, ...], tuple[float, ...]]:
    """The answer, the candidates and their relevance; `manner` is the wording that one dialogue keeps throughout."""
    forms = [0, 1, 3] if subject == "relation" else [0, 2, 3]  # "yes it is", "yes there is"
    form = forms[manner] if kind in ("yes", "no") else manner
    answer = [a for a in _LIKE[kind] if (a.kind, a.value) == (kind, value)][form]
    # All answers that fit such a question are candidates; others fill the rest.
    options = dice.shuffled([*_LIKE[kind], *dice.shuffled(_UNLIKE[kind])[: CANDIDATES - len(_LIKE[kind])]])
    return answer, tuple(options), tuple(_right(a, kind, value) for a in options)


def _right(answer: Reply, kind: str, value: str) -> float:
    """Relevance of an answer, 0 to 1, where `value` is the truth."""
    if answer.kind != kind:
        return 0.0
    if answer.value == value:
        return 1.0
    return _NEAR if kind == "place" and answer.value in value.split() else 0.0


# Questions ------------------------------------------------------------------------------------------------------------

Exchange = tuple[str, tuple[str, str], Thing | None]
"""A question, the meaning of its answer (kind and value), and the thing it mentions."""
MakeExchange = Callable[[Dice, Scene, Thing | None], Exchange | None]


def _truth(holds: bool) -> tuple[str, str]:
    return ("yes" if holds else "no"), ""


def _only(one: Scene, **attributes: str) -> bool:
    """Whether exactly one thing has these attributes."""
    return sum(all(getattr(t, name) == value for name, value in attributes.items()) for t in one.things) == 1


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _how_many(dice: Dice, one: Scene, it: Thing | None) -> Exchange:
    question = dice.choice(("how many things are there ?", "how many shapes do you see ?"))
    return question, ("count", _NUMBERS[len(one.things)]), None


def _behind(dice: Dice, one: Scene, it: Thing | None) -> Exchange:
    return "what is the background like ?", ("background", one.background.kind), None


def _is_there(dice: Dice, one: Scene, it: Thing | None) -> Exchange:
    """Ask whether there is a thing of a shape, of a colour or of both."""
    thing = dice.choice(one.things)
    by, here = dice.choice(("shape", "colour", "both")), dice.chance(0.5)
    shape = thing.shape if here or (by == "both" and dice.chance(0.5)) else dice.choice(SHAPES)
    colour = thing.colour if here else dice.choice(tuple(COLOURS))
    if by == "both" and one.split != "composition":
        colour = next(c for c in (colour, *dice.shuffled(tuple(COLOURS))) if (c, shape) not in HELD_OUT)
    name = {"shape": shape, "colour": f"{colour} thing", "both": f"{colour} {shape}"}[by]
    fits = [t for t in one.things if (by == "colour" or t.shape == shape) and (by == "shape" or t.colour == colour)]
    return f"is there {_a(name)} ?", _truth(bool(fits)), fits[0] if len(fits) == 1 else None


def _colour_of(dice: Dice, one: Scene, it: Thing | None) -> Exchange | None:
    thing = dice.choice(one.things)
    if not _only(one, shape=thing.shape):
        return None
    return f"what colour is the {thing.shape} ?", ("colour", thing.colour), thing


def _shape_of(dice: Dice, one: Scene, it: Thing | None) -> Exchange | None:
    thing = dice.choice(one.things)
    if not _only(one, colour=thing.colour):
        return None
    return f"what shape is the {thing.colour} thing ?", ("shape", thing.shape), thing


def _where_is(dice: Dice, one: Scene, it: Thing | None) -> Exchange | None:
    thing = dice.choice(one.things)
    return f"where is the {thing.colour} {thing.shape} ?", ("place", thing.place), thing


def _size_of(dice: Dice, one: Scene, it: Thing | None) -> Exchange | None:
    thing = dice.choice(one.things)
    return f"what size is the {thing.colour} {thing.shape} ?", ("size", thing.size), thing


def _colour_of_it(dice: Dice, one: Scene, it: Thing | None) -> Exchange:
    return "what colour is it ?", ("colour", it.colour), it


def _shape_of_it(dice: Dice, one: Scene, it: Thing | None) -> Exchange:
    return "what shape is it ?", ("shape", it.shape), it


def _size_of_it(dice: Dice, one: Scene, it: Thing | None) -> Exchange:
    return "what size is it ?", ("size", it.size), it


def _where_is_it(dice: Dice, one: Scene, it: Thing | None) -> Exchange:
    return "where is it ?", ("place", it.place), it


def _relation_of_it(dice: Dice, one: Scene, it: Thing | None) -> Exchange | None:
    others = [t for t in one.things if t is not it]
    if not others:
        return None
    other, relation = dice.choice(others), dice.choice(RELATIONS)
    way = f"to the {relation}" if "of" in relation else relation
    holds = relation in relations_of(it, other)
    return f"is it {way} the {other.colour} {other.shape} ?", _truth(holds), it


_OF_SCENE: dict[str, MakeExchange] = {
    "count": _how_many,
    "background": _behind,
    "is_there": _is_there,
    "colour": _colour_of,
    "shape": _shape_of,
    "place": _where_is,
    "size": _size_of,
}
_OF_IT: dict[str, MakeExchange] = {
    "colour": _colour_of_it,
    "shape": _shape_of_it,
    "size": _size_of_it,
    "place": _where_is_it,
    "relation": _relation_of_it,
}


# Files ----------------------------------------------------------------------------------------------------------------


def write(
    out: str | Path,
    split: Split = "train",
    count: int = 200,
    seed: int = 0,
    size: int = 64,
    overwrite: bool = False,
) -> list[Path]:
    """Write dialogues in VisDial v1.0's layout: SPLIT.json, SPLIT-dense.json and SPLIT/ with the images.

    A dialogue has an `image` in addition to VisDial's keys, since scenes are not numbered like COCO's images. Dense
    annotations cover one round of each dialogue, as in VisDial. The same settings give the same bytes.

    Args:
        out: Folder to write into; several splits may share one.
        split: train, val and test share no scene; composition shows colour-shape pairs that no other split has.
        count: Number of dialogues.
        seed: Random seed of the scenes; another seed gives other images of the same splits.
        size: Side of the images in pixels.
        overwrite: Replace what an earlier call wrote for this split.

    Returns:
        The files and folders written. ValueError for invalid settings, FileExistsError if a file exists.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be 1 or more, got {count} and {size}")

    def fill(folder: Path) -> None:
        (folder / split).mkdir()
        questions: dict[str, int] = {}
        dialogs, dense = [], []
        for i in progress(range(count), count, "dialogues", f"dialogues {split}"):
            talk = dialogue(scene(seed, i, split))
            name = f"{split}/{talk.scene.image_id}.jpg"
            (folder / name).write_bytes(files.jpeg(draw(talk.scene, size)))
            rounds = [_row(turn, questions) for turn in talk.turns]
            dialogs.append({"image_id": i, "image": name, "caption": talk.caption, "dialog": rounds})
            chosen = Dice("dense", seed, split, i).below(ROUNDS)
            relevance = list(talk.turns[chosen].relevance)
            dense.append({"image_id": i, "round_id": chosen + 1, "gt_relevance": relevance})
        data = {"dialogs": dialogs, "questions": list(questions), "answers": [a.text for a in ANSWERS]}
        (folder / f"{split}.json").write_text(json.dumps({"version": "1.0", "split": split, "data": data}) + "\n")
        (folder / f"{split}-dense.json").write_text(json.dumps(dense) + "\n")

    return publish(Path(out), [split, f"{split}.json", f"{split}-dense.json"], fill, overwrite)


_NUMBER_OF = {answer: number for number, answer in enumerate(ANSWERS)}


def _row(turn: Turn, questions: dict[str, int]) -> dict:
    return {
        "question": questions.setdefault(turn.question, len(questions)),
        "answer": _NUMBER_OF[turn.answer],
        "answer_options": [_NUMBER_OF[option] for option in turn.options],
        "gt_index": turn.options.index(turn.answer),
    }


def main(args: list[str] | None = None) -> None:
    """The command line."""
    command_line(write, args)


if __name__ == "__main__":
    main()
