"""Pairs of scenes of the synthetic world with a sentence that is true or false of them, in the format of NLVR2.

    python -m blip.world.pairs --out runs/world-pairs --sets 2500

A set is a sentence and four pairs made of the same few scenes; the sentence is true of half of them. So neither the
sentence nor one image alone gives the label away, and often a true and a false pair differ only in the order of images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blip.world import files
from blip.world.files import command_line, progress, publish
from blip.world.scene import BACKGROUNDS, RELATIONS, Dice, Scene, Split, draw, relations_of, scene

PAIRS = 4
"""Pairs in a set, as in NLVR2; the sentence is true of half of them."""
_SCENES = 5
"""Scenes from which the pairs of a set are formed."""
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

Truth = Callable[[Scene, Scene], bool]


@dataclass(frozen=True)
class ImagePair:
    """Two scenes, a sentence, and whether it is true of them."""

    identifier: str
    left: Scene
    right: Scene
    sentence: str
    label: bool
    kind: str
    """Kind of sentence: a key of `_SENTENCES`."""


def pairs(seed: int, number: int, split: str = "train") -> list[ImagePair]:
    """The pairs of set `number`: the sentence is true of two and false of two."""
    dice = Dice("pairs", seed, split, number)
    kind = dice.choice(tuple(_SENTENCES))
    while True:
        scenes = [scene(seed, dice.below(2**31), split) for _ in range(_SCENES)]
        every = [(a, b) for a in scenes for b in scenes if a is not b]
        sentence, truth = _SENTENCES[kind](dice, *scenes[:2])
        # The first pair and the same pair swapped come first, which makes hard cases likely.
        first, rest = [*every[:1], (scenes[1], scenes[0])], dice.shuffled(every[1:])
        ordered = first + [pair for pair in rest if pair != first[1]]
        true = [pair for pair in ordered if truth(*pair)][: PAIRS // 2]
        false = [pair for pair in ordered if not truth(*pair)][: PAIRS // 2]
        if len(true) == len(false) == PAIRS // 2:
            break
    labelled = dice.shuffled([(pair, True) for pair in true] + [(pair, False) for pair in false])
    return [
        ImagePair(f"{split}-{number}-{k}-0", left, right, sentence, label, kind)
        for k, ((left, right), label) in enumerate(labelled)
    ]


# Sentences ------------------------------------------------------------------------------------------------------------


class _Description:
    """Things of a shape, of a colour, or of both, and their name."""

    def __init__(self, dice: Dice, one: Scene) -> None:
        thing, attributes = dice.choice(one.things), dice.choice(("both", "both", "shape", "colour"))
        self.shape = None if attributes == "colour" else thing.shape
        self.colour = None if attributes == "shape" else thing.colour
        noun = self.shape or "thing"
        self.plural = f"{self.colour or ''} {noun}{'es' if noun == 'cross' else 's'}".strip()
        name = f"{self.colour or ''} {noun}".strip()
        self.name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

    def of(self, one: Scene) -> list:
        fits = ((self.shape in (None, t.shape)) and (self.colour in (None, t.colour)) for t in one.things)
        return [thing for thing, fit in zip(one.things, fits, strict=True) if fit]


def _on_a_side(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "the left image shows a red star" """
    described = _Description(dice, a)
    side = dice.choice(("left", "right"))
    shows = dice.choice(("shows", "contains", "has"))
    return f"the {side} picture {shows} {described.name}", lambda x, y: bool(described.of(x if side == "left" else y))


def _in_both(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "both images show a star" """
    described = _Description(dice, a)
    sentence = dice.choice((f"both pictures show {described.name}", f"there is {described.name} in each picture"))
    return sentence, lambda x, y: bool(described.of(x) and described.of(y))


def _in_one(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "only one image shows a star" """
    described = _Description(dice, a)
    sentence = dice.choice(
        (f"only one picture shows {described.name}", f"exactly one picture contains {described.name}")
    )
    return sentence, lambda x, y: bool(described.of(x)) != bool(described.of(y))


def _in_none(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "neither image shows a star", or "there is at least one star" """
    described = _Description(dice, a)
    if dice.chance(0.5):
        return f"neither picture shows {described.name}", lambda x, y: not (described.of(x) or described.of(y))
    return f"there is at least one {described.name.split(' ', 1)[1]}", lambda x, y: bool(
        described.of(x) or described.of(y)
    )


def _one_and_other(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "one image shows a red star and the other a blue ring" """
    first, second = _Description(dice, a), _Description(dice, b)

    def truth(x: Scene, y: Scene) -> bool:
        return bool((first.of(x) and second.of(y)) or (first.of(y) and second.of(x)))

    return f"one picture shows {first.name} and the other shows {second.name}", truth


def _how_many(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "there are four shapes in the two images" """
    total = len(a.things) + len(b.things)
    number = _NUMBERS[total]
    sentence = dice.choice((f"there are {number} things in the two pictures", f"the two pictures show {number} shapes"))
    return sentence, lambda x, y: len(x.things) + len(y.things) == total


def _more(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "there are more shapes in the left image" """
    side, more = dice.choice(("left", "right")), dice.choice(("more", "fewer"))

    def truth(x: Scene, y: Scene) -> bool:
        here, there = (len(x.things), len(y.things)) if side == "left" else (len(y.things), len(x.things))
        return here > there if more == "more" else here < there

    return f"there are {more} things in the {side} picture than in the other", truth


def _as_many(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "both images show two shapes" """
    count = len(a.things)
    shapes = "shape" if count == 1 else "shapes"
    if dice.chance(0.5):
        return "both pictures show as many shapes", lambda x, y: len(x.things) == len(y.things)
    return (
        f"one of the pictures shows exactly {_NUMBERS[count]} {shapes}",
        lambda x, y: (len(x.things) == count) != (len(y.things) == count),
    )


def _related(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "in one image a star is above a ring" """
    first, second = _Description(dice, a), _Description(dice, a)
    relation = dice.choice(RELATIONS)

    def holds(one: Scene) -> bool:
        both = ((p, q) for p in first.of(one) for q in second.of(one) if p is not q)
        return any(relation in relations_of(p, q) for p, q in both)

    way = f"to the {relation}" if "of" in relation else relation
    return f"in one picture {first.name} is {way} {second.name}", lambda x, y: holds(x) or holds(y)


def _background(dice: Dice, a: Scene, b: Scene) -> tuple[str, Truth]:
    """ "the left image has a plain background" """
    kind = dice.choice(BACKGROUNDS)
    side = dice.choice(("left", "right", "both"))
    if side == "both":
        return (
            f"both pictures have a {kind} background",
            lambda x, y: x.background.kind == y.background.kind == kind,
        )
    return (
        f"the {side} picture has a {kind} background",
        lambda x, y: (x if side == "left" else y).background.kind == kind,
    )


_SENTENCES: dict[str, Callable[[Dice, Scene, Scene], tuple[str, Truth]]] = {
    "side": _on_a_side,
    "both": _in_both,
    "one": _in_one,
    "none": _in_none,
    "other": _one_and_other,
    "count": _how_many,
    "more": _more,
    "equal": _as_many,
    "relation": _related,
    "background": _background,
}
"""For each kind of sentence, a function that makes one from two scenes and returns it with its truth function."""


# Files ----------------------------------------------------------------------------------------------------------------


def write(
    out: str | Path,
    split: Split = "train",
    sets: int = 250,
    seed: int = 0,
    size: int = 64,
    overwrite: bool = False,
) -> list[Path]:
    """Write pairs of images with sentences in NLVR2's layout: SPLIT.json, one object per line, and SPLIT/ with images.

    A row has `identifier` (split, set, pair, sentence), `sentence`, `label` ("True" or "False"), `kind` (of sentence)
    and `scenes` (the ids of the two scenes). The images of row dev-3-1-0 are dev-3-1-img0.png and dev-3-1-img1.png. The
    same settings give the same bytes.

    Args:
        out: Folder to write into; several splits may share one.
        split: train, val and test share no scene; composition shows colour-shape pairs that no other split has.
        sets: Number of sets, of four pairs each.
        seed: Random seed of the scenes; another seed gives other images of the same splits.
        size: Side of the images in pixels.
        overwrite: Replace what an earlier call wrote for this split.

    Returns:
        The files and folders written. ValueError for invalid settings, FileExistsError if a file exists.
    """
    if sets < 1 or size < 1:
        raise ValueError(f"sets and size must be 1 or more, got {sets} and {size}")

    def fill(folder: Path) -> None:
        images = folder / split
        images.mkdir()
        with (folder / f"{split}.json").open("w") as file:
            for number in progress(range(sets), sets, "sets", f"pairs {split}"):
                for pair in pairs(seed, number, split):
                    file.write(json.dumps(_row(pair)) + "\n")
                    for k, one in enumerate((pair.left, pair.right)):
                        name = f"{pair.identifier.rsplit('-', 1)[0]}-img{k}.png"
                        (images / name).write_bytes(files.jpeg(draw(one, size)))  # JPEG in .png, as in NLVR2

    return publish(Path(out), [split, f"{split}.json"], fill, overwrite)


def _row(pair: ImagePair) -> dict:
    scenes = [pair.left.image_id, pair.right.image_id]
    row = {"identifier": pair.identifier, "sentence": pair.sentence, "label": str(pair.label)}
    return {**row, "kind": pair.kind, "scenes": scenes}


def main(args: list[str] | None = None) -> None:
    """The command line."""
    command_line(write, args)


if __name__ == "__main__":
    main()
