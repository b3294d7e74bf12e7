"""Texts about a scene: five captions as a person would write them, or one text as found on the web.

Every caption is true. A web text is right, or wrong in a recorded way, so a filter can be graded against the truth.
`blip.world.judge` recovers every claim that a template makes, without knowing which template was used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from blip.world import scene as world
from blip.world.judge import COLOUR_WORDS, SHAPE_WORDS, judge, parse
from blip.world.scene import HELD_OUT, Dice, Scene, Thing

NOISE = 0.6
"""Default share of web texts that are not a right caption."""
MIXTURE = {"mismatched": 0.35, "near_miss": 0.25, "vague": 0.25, "junk_around": 0.15}
"""Share of each kind of noise among noisy web texts."""
KINDS = ("right", *MIXTURE)

_SIZES = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big")}
_SHAPES = {"circle": ("circle", "circle", "disc"), "moon": ("moon", "moon", "crescent")}
_WHERE = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "middle": ("in the middle", "in the centre"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
_CORNER = ("at the {}", "in the {}", "in the {} corner")
_RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under", "beneath"),
}
_COUNTED = {1: ("one shape", "a single shape"), 2: ("two shapes", "two things"), 3: ("three shapes", "three things")}
_OPENINGS = ("", "", "", "", "there is ", "this is ", "you can see ", "a picture of ", "an image of ", "a drawing of ")
_VAGUE = (
    "great offer",
    "IMG_{n}.jpg",
    "DSC{n}",
    "photo of the day",
    "best price online, free shipping",
    "untitled",
    "click here for more",
    "summer {year}",
    "paris, {day} may {year}",
    "our trip to london",
    "wallpaper hd {n}",
    "posted by admin on {day}/{month}/{year}",
    "image {n} of {n}",
    "new arrivals for {year}",
    "so beautiful!",
    "size chart",
    "stock photo",
    "my favourite one",
    "home page banner",
    "download for free",
)
_BEFORE = (
    "free shipping!",
    "img_{n}.jpg:",
    "sale {year} -",
    "buy now:",
    "new for {year}:",
    "stock photo:",
    "hot deal |",
)
_AFTER = ("- best price online", "| shop now", "(photo by admin)", "#{n}", "... read more", "- from $ {day}", "!!! wow")


class WebText(NamedTuple):
    """A text found beside an image, and what it really is: one of `KINDS`."""

    text: str
    kind: str


def captions(scene: Scene) -> list[str]:
    """Five different captions of a scene, all true, 4 to about 20 words, lower case.

    Four name the colour and shape of every thing and differ in what they add: size, place, relation, number,
    background. The fifth, at a random position, leaves something out.
    """
    dice = _dice("captions", scene)
    if len(scene.things) == 1:
        styles = [_listed, _placed, _placed, _counted, _brief]
    else:
        styles = [_listed, _counted, _placed, _related, _brief]
    texts: list[str] = []
    for style in dice.shuffled(styles):
        text = style(dice, scene)
        while text in texts or len(text.split()) < 4:
            text = style(dice, scene)
        texts.append(text)
    return texts


def description(scene: Scene) -> str:
    """Describe a scene completely in one sentence: how many things, each one's attributes and place, background.

    Things come in reading order, row by row from the left; wording varies.
    """
    dice = _dice("description", scene)
    things = sorted(scene.things, key=lambda thing: thing.cell)
    parts = [f"{_name(dice, thing, size=1)} {_where(dice, thing)}" for thing in things]
    return f"{dice.choice(_COUNTED[len(things)])}: {_join(parts)}{_behind(dice, scene, 1)}"


def web_text(scene: Scene, noise: float = NOISE) -> WebText:
    """One text as a web crawl would contain it; with probability `noise` a wrong one, its kind drawn from `MIXTURE`."""
    if not 0 <= noise <= 1:
        raise ValueError(f"the noise rate must be in [0, 1], got {noise}")
    dice = _dice("web", scene)
    if not dice.chance(noise):
        return WebText(dice.choice(captions(scene)), "right")
    kind = _kind(dice)
    return WebText(_NOISES[kind](dice, scene), kind)


def _kind(dice: Dice) -> str:
    """A kind of noise, drawn from `MIXTURE`."""
    position = dice.below(1000) / 1000 * sum(MIXTURE.values())
    for kind, end in zip(MIXTURE, accumulate(MIXTURE.values()), strict=True):
        if position < end:
            return kind
    return kind


def _dice(purpose: str, scene: Scene) -> Dice:
    return Dice(purpose, scene.seed, scene.split, scene.i)


# ---- captions


def _listed(dice: Dice, scene: Scene) -> str:
    """ "a small red star, a blue ring and a green moon on a speckled background" """
    names = [_name(dice, thing, size=0.6) for thing in dice.shuffled(scene.things)]
    if len(names) == 1:
        where = _where(dice, scene.things[0])
        return dice.choice(_OPENINGS) + f"{names[0]} {where}{_behind(dice, scene, 0.5)}"
    return dice.choice(_OPENINGS) + _join(names) + _behind(dice, scene, 0.35)


def _counted(dice: Dice, scene: Scene) -> str:
    """ "two shapes: a red star and a large blue ring" """
    count = dice.choice(_COUNTED[len(scene.things)])
    names = [_name(dice, thing, size=0.4) for thing in dice.shuffled(scene.things)]
    end = f" {_where(dice, scene.things[0])}" if len(names) == 1 else ""
    return count + dice.choice((": ", ", ")) + _join(names) + end


def _placed(dice: Dice, scene: Scene) -> str:
    """ "a red star at the top left and a blue ring in the middle" """
    size = 0.9 if len(scene.things) == 1 else 0.25
    parts = [f"{_name(dice, thing, size)} {_where(dice, thing)}" for thing in dice.shuffled(scene.things)]
    opening = "" if len(parts) == 3 else dice.choice(_OPENINGS)
    return opening + _join(parts) + _behind(dice, scene, 0.5 if len(parts) == 1 else 0.0)


def _related(dice: Dice, scene: Scene) -> str:
    """ "a red star to the left of a blue ring", and a third thing related to the second, between two, or added."""
    a, b, *rest = dice.shuffled(scene.things)
    for middle, (one, two) in ((a, (b, *rest)), (b, (a, *rest))) if rest else ():
        if world.is_between(middle, one, two) and dice.chance(0.7):
            return f"{_name(dice, middle, 0.3)} between {_name(dice, one, 0.2)} and {_name(dice, two, 0.2)}"
    first, second, relation = _name(dice, a, 0.4), _name(dice, b, 0.4), _relation(dice, a, b)
    if dice.chance(0.25):
        text = f"{_the(first)} is {relation} {second}"
    else:
        text = dice.choice(_OPENINGS[:8]) + f"{first} {relation} {second}"
    for c in rest:
        third = _name(dice, c, 0.2)
        if dice.chance(0.6):
            text += dice.choice((", which is ", " that is ")) + f"{_relation(dice, b, c)} {third}"
        else:
            text += f", and {third}" + (f" {_where(dice, c)}" if dice.chance(0.5) else "")
    return text


def _brief(dice: Dice, scene: Scene) -> str:
    """True but less specific: one thing without its colour, or one of three left out."""
    things = dice.shuffled(scene.things)
    if len(things) == 1:
        return dice.choice(_OPENINGS) + f"{_name(dice, things[0], 0.7, colour=False)} {_where(dice, things[0])}"
    if len(things) == 3 and dice.chance(0.5):
        return dice.choice(_OPENINGS) + _join([_name(dice, thing, 0.5) for thing in things[:2]])
    names = [_name(dice, things[0], 0.5, colour=False), *(_name(dice, thing, 0.3) for thing in things[1:])]
    return dice.choice(_OPENINGS) + _join(dice.shuffled(names)) + _behind(dice, scene, 0.2)


def _name(dice: Dice, thing: Thing, size: float, colour: bool = True) -> str:
    """ "a small red star"; the size is included with probability `size`."""
    words = [dice.choice(_SIZES[thing.size])] if dice.chance(size) else []
    words += [thing.colour] if colour else []
    words.append(dice.choice(_SHAPES.get(thing.shape, (thing.shape,))))
    return _article(" ".join(["a", *words]))


def _article(text: str) -> str:
    return re.sub(r"\ban?(?= [aeiou])", "an", re.sub(r"\ban(?= [^aeiou])", "a", text))


def _the(name: str) -> str:
    return "the " + name.split(" ", 1)[1]


def _where(dice: Dice, thing: Thing) -> str:
    return dice.choice(_WHERE[thing.place]) if thing.place in _WHERE else dice.choice(_CORNER).format(thing.place)


def _relation(dice: Dice, a: Thing, b: Thing) -> str:
    return dice.choice(_RELATIONS[dice.choice(world.relations_of(a, b))])


def _behind(dice: Dice, scene: Scene, probability: float) -> str:
    return f" on a {scene.background.kind} background" if dice.chance(probability) else ""


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# ---- noise


def _mismatched(dice: Dice, scene: Scene) -> str:
    """A caption of another scene of the split that is false here."""
    while True:
        other = world.scene(scene.seed, dice.below(2**31), scene.split)
        text = dice.choice(captions(other))
        if not judge(scene, text).true:
            return text


_SWAPS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {word: tuple(world.COLOURS) for word in COLOUR_WORDS},
    "shape": dict.fromkeys(SHAPE_WORDS, world.SHAPES),
    "size": {
        **dict.fromkeys(_SIZES["small"], _SIZES["large"]),
        **dict.fromkeys(_SIZES["large"], _SIZES["small"]),
    },
    "side": {"left": ("right",), "right": ("left",), "top": ("bottom",), "bottom": ("top",)},
    "relation": {"above": ("below", "under"), **dict.fromkeys(("below", "under", "beneath"), ("above",))},
    "count": {"two": ("three",), "three": ("two",)},
    "background": {kind: tuple(k for k in world.BACKGROUNDS if k != kind) for kind in world.BACKGROUNDS},
}
"""For each kind of claim, the words that make it and their replacements, which make another claim of that kind."""


def _near_miss(dice: Dice, scene: Scene) -> str:
    """A caption of the scene made false by replacing one word."""
    texts = captions(scene)
    while True:
        words = re.findall(r"\w+|\W+", dice.choice(texts))
        kinds = [kind for kind, swaps in _SWAPS.items() if any(word in swaps for word in words)]
        swaps = _SWAPS[dice.choice(kinds)]
        at = dice.choice([k for k, word in enumerate(words) if word in swaps])
        words[at] = dice.choice(swaps[words[at]])
        text = _article("".join(words))
        if not judge(scene, text).true and (scene.split == "composition" or not _names_held_out(text)):
            return text


def _names_held_out(text: str) -> bool:
    return any((mention.colour, mention.shape) in HELD_OUT for mention in parse(text).mentions)


def _vague(dice: Dice, scene: Scene) -> str:
    return _filled(dice, dice.choice(_VAGUE))


def _junk_around(dice: Dice, scene: Scene) -> str:
    """A less specific caption surrounded by words that have nothing to do with the image."""
    text = _brief(dice, scene)
    before, after = dice.choice(((1, 0), (0, 1), (1, 1)))
    parts = [_filled(dice, dice.choice(_BEFORE))] * before + [text] + [_filled(dice, dice.choice(_AFTER))] * after
    return " ".join(parts)


def _filled(dice: Dice, template: str) -> str:
    return template.format(
        n=dice.between(1000, 9999), day=dice.between(1, 28), month=dice.between(1, 12), year=dice.between(2005, 2022)
    )


_NOISES: dict[str, Callable[[Dice, Scene], str]] = {
    "mismatched": _mismatched,
    "near_miss": _near_miss,
    "vague": _vague,
    "junk_around": _junk_around,
}
