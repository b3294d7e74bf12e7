"""The synthetic world: scenes of one to three things on a background, and how they are drawn.

A scene is a pure function of (seed, split, i): the same on every machine, in every process, and nothing is stored.
`blip.world.text` generates human captions and web texts of a scene, `blip.world.judge` parses a text and grades it, and
`blip.world.files` writes images and texts in the formats of real data sets. Questions, pairs and clips start from the
same `Scene` and their own `Dice` key, so adding a kind never changes the others.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from PIL import Image, ImageDraw

Split = Literal["train", "val", "test", "composition"]
SPLITS: tuple[str, ...] = get_args(Split)

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = {
    "red": (216, 30, 36),
    "orange": (250, 136, 16),
    "yellow": (250, 226, 44),
    "green": (24, 148, 52),
    "blue": (30, 76, 220),
    "purple": (146, 44, 186),
    "white": (246, 246, 246),
    "pink": (255, 140, 190),
}
RADII = {"small": (134, 149), "large": (206, 222)}
"""Smallest and largest radius of each size, thousandths of the image's side: 18 and 27 px across at 64 px."""
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""Names of the cells of a 3 x 3 grid, row by row."""
BACKGROUNDS = ("plain", "gradient", "speckled")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

HELD_OUT = frozenset(
    {
        ("orange", "circle"),
        ("blue", "square"),
        ("white", "triangle"),
        ("green", "star"),
        ("pink", "heart"),
        ("yellow", "cross"),
        ("purple", "ring"),
        ("red", "moon"),
    }
)
"""Colour-shape pairs shown only in the split `composition`; each colour and each shape is in exactly one."""

_TONES = ((36, 36, 36), (44, 36, 28), (28, 35, 44), (30, 42, 30), (42, 31, 40))
"""Background colours, dark and dull, so that every thing is brighter than what is behind it."""
_COUNTS = (1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3)
_NEARNESS = 0.9
"""Minimum distance between two things, as a share of the sum of their radii."""
_SPECKLES = 32
"""Cells along one side of a speckled background."""

T = TypeVar("T")


class Dice:
    """Random draws that are the same on every machine: 32-bit words of SHAKE-128 over a key.

    Python's and NumPy's generators may draw differently from one version to the next; a hash function may not.
    """

    def __init__(self, *key: str | int) -> None:
        self._hash = hashlib.shake_128("\x1f".join(map(str, key)).encode())
        self._words: tuple[int, ...] = ()
        self._at = 0

    def word(self) -> int:
        if self._at == len(self._words):
            words = max(128, 2 * len(self._words))
            self._words = struct.unpack(f"<{words}I", self._hash.digest(4 * words))
        self._at += 1
        return self._words[self._at - 1]

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1 (n far below 2**32)."""
        return self.word() * n >> 32

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.word() < probability * 2**32

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in items]


@dataclass(frozen=True)
class Thing:
    """One object of a scene; lengths in thousandths of the image's side, y downwards."""

    shape: str
    colour: str
    size: str
    cell: int
    """Cell of the grid, 0 to 8, row by row."""
    x: int
    y: int
    radius: int
    tilt: int
    """Rotation, degrees clockwise."""
    tint: tuple[int, int, int]
    """Offsets added to the colour's red, green and blue."""

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Background:
    kind: str
    tone: tuple[int, int, int]
    turn: int
    """Direction of a gradient, quarter turns."""
    seed: int
    """Random seed of the speckles."""


@dataclass(frozen=True)
class Scene:
    """What an image shows; `things` are in drawing order, back to front, and no two share both colour and shape."""

    seed: int
    split: str
    i: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def image_id(self) -> str:
        """The scene's name in files; `scene_of` is the inverse."""
        return f"world-{self.seed}-{self.split}-{self.i:06d}"


def scene(seed: int, i: int, split: str = "train") -> Scene:
    """Scene `i` of a split.

    A scene's split follows from its things alone (shape, colour, size, place), so no two splits share a scene, whatever
    the seeds; a colour-shape pair of `HELD_OUT` occurs only in `composition`.
    """
    if split not in SPLITS:
        raise ValueError(f"the synthetic world has no split {split!r}; expected one of {', '.join(SPLITS)}")
    dice = Dice("scene", seed, split, i)
    while True:
        things = _things(dice, held_out=split == "composition")
        if split_of(things) == split:
            return Scene(int(seed), split, int(i), _background(dice), things)


def scene_of(image_id: str) -> Scene:
    """The scene that `Scene.image_id` names; ValueError for another name."""
    parts = image_id.split("-")
    if len(parts) != 4 or parts[0] != "world":
        raise ValueError(f"{image_id!r} does not name a scene: expected world-SEED-SPLIT-NUMBER")
    return scene(int(parts[1]), int(parts[3]), parts[2])


def content(things: Sequence[Thing]) -> str:
    """Visible attributes of things in canonical order: equal for scenes that differ only in jitter."""
    return "; ".join(sorted(f"{t.size} {t.colour} {t.shape} {t.place}" for t in things))


def split_of(things: Sequence[Thing]) -> str:
    """The one split in which these things may appear: 80% train, 10% val, 10% test, or composition."""
    if any((t.colour, t.shape) in HELD_OUT for t in things):
        return "composition"
    return (["val", "test"] + ["train"] * 8)[Dice("split", content(things)).below(10)]


def facts(scene: Scene) -> dict[str, Any]:
    """The truth about a scene as plain JSON: count, background, things, and the relations of each pair of things."""
    things = [{"shape": t.shape, "colour": t.colour, "size": t.size, "place": t.place} for t in scene.things]
    pairs = [(a, b) for a in range(len(things)) for b in range(a + 1, len(things))]
    relations = [[a, name, b] for a, b in pairs for name in relations_of(scene.things[a], scene.things[b])]
    return {"count": len(things), "background": scene.background.kind, "things": things, "relations": relations}


def relations_of(a: Thing, b: Thing) -> list[str]:
    """Where `a` is relative to `b`: one or two of `RELATIONS`; things in one row are neither above nor below."""
    across = [] if a.column == b.column else ["left of" if a.column < b.column else "right of"]
    down = [] if a.row == b.row else ["above" if a.row < b.row else "below"]
    return across + down


def is_between(middle: Thing, a: Thing, b: Thing) -> bool:
    """Whether `middle` is halfway between `a` and `b` on the grid."""
    return a.row + b.row == 2 * middle.row and a.column + b.column == 2 * middle.column


def _things(dice: Dice, held_out: bool) -> tuple[Thing, ...]:
    count = dice.choice(_COUNTS)
    pairs: list[tuple[str, str]] = [dice.choice(sorted(HELD_OUT))] if held_out else []
    while len(pairs) < count:
        pair = (dice.choice(tuple(COLOURS)), dice.choice(SHAPES))
        if pair not in HELD_OUT and pair not in pairs:
            pairs.append(pair)
    pairs = dice.shuffled(pairs)
    sizes = [dice.choice(tuple(RADII)) for _ in pairs]
    while True:
        cells = dice.shuffled(range(9))
        things = tuple(_thing(dice, *pair, size, cell) for pair, size, cell in zip(pairs, sizes, cells, strict=False))
        if all(_apart(a, b) for n, a in enumerate(things) for b in things[:n]):
            return things


def _thing(dice: Dice, colour: str, shape: str, size: str, cell: int) -> Thing:
    radius = dice.between(*RADII[size])
    x, y = (
        min(max(200 + 300 * step + dice.between(-45, 45), radius + 10), 990 - radius) for step in (cell % 3, cell // 3)
    )
    tint = (dice.between(-9, 9), dice.between(-9, 9), dice.between(-9, 9))
    return Thing(shape, colour, size, cell, x, y, radius, dice.between(-12, 12), tint)


def _apart(a: Thing, b: Thing) -> bool:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 >= (_NEARNESS * (a.radius + b.radius)) ** 2


def _background(dice: Dice) -> Background:
    shift = dice.between(-10, 10)
    red, green, blue = (level + shift for level in dice.choice(_TONES))
    return Background(dice.choice(BACKGROUNDS), (red, green, blue), dice.below(4), dice.word())


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene: RGB, size x size pixels, antialiased.

    Vertices are rounded to fractions of a pixel and all later arithmetic is in integers, so the pixels do not depend on
    the machine.
    """
    image = _draw_background(scene.background, size)
    for thing in scene.things:
        _draw_thing(image, thing, size)
    return image


def _draw_background(background: Background, size: int) -> Image.Image:
    if background.kind == "gradient":
        ramp = Image.linear_gradient("L").resize((size, size), Image.Resampling.BILINEAR)
        return _toned(ramp.rotate(90 * background.turn), background.tone, 12)
    if background.kind == "speckled":
        noise = hashlib.shake_128(background.seed.to_bytes(4, "little")).digest(_SPECKLES**2)
        cells = Image.frombytes("L", (_SPECKLES, _SPECKLES), noise.translate(_SPECKLE_LEVELS))
        return _toned(cells.resize((size, size), Image.Resampling.NEAREST), background.tone, 12)
    return Image.new("RGB", (size, size), background.tone)


_SPECKLE_LEVELS = bytes([0] * 40 + [128] * 176 + [255] * 40)
"""Maps a random byte to darker than the ground, equal to it, or lighter."""


def _toned(level: Image.Image, tone: tuple[int, int, int], swing: int) -> Image.Image:
    """Map grey levels 0 to 255 to `tone` - swing to `tone` + swing."""
    table = [middle + (grey - 128) * swing // 128 for middle in tone for grey in range(256)]
    return Image.merge("RGB", (level, level, level)).point(table)


def _draw_thing(image: Image.Image, thing: Thing, size: int) -> None:
    fine = 8 if size < 160 else 4
    left, top = ((centre - 1.2 * thing.radius) * size / 1000 for centre in (thing.x, thing.y))
    left, top = math.floor(left), math.floor(top)
    side = math.ceil(2.4 * thing.radius * size / 1000) + 1
    x, y, radius = (fine * length * size / 1000 for length in (thing.x, thing.y, thing.radius))
    mask = Image.new("L", (side * fine, side * fine))
    _draw_shape(ImageDraw.Draw(mask), thing.shape, x - fine * left, y - fine * top, radius, math.radians(thing.tilt))
    red, green, blue = (min(max(c + t, 0), 255) for c, t in zip(COLOURS[thing.colour], thing.tint, strict=True))
    image.paste((red, green, blue), (left, top), mask.reduce(fine))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, tilt: float) -> None:
    across, down = radius * math.cos(tilt), radius * math.sin(tilt)

    def at(u: float, v: float) -> tuple[int, int]:
        return round(x + u * across - v * down), round(y + u * down + v * across)

    def disc(u: float, v: float, part: float, fill: int) -> None:
        (middle_x, middle_y), half = at(u, v), round(part * radius)
        pen.ellipse((middle_x - half, middle_y - half, middle_x + half, middle_y + half), fill)

    if shape in _OUTLINES:
        pen.polygon([at(u, v) for u, v in _OUTLINES[shape]], 255)
    else:
        disc(0, 0, 1, 255)
        if shape == "ring":
            disc(0, 0, 0.55, 0)
        elif shape == "moon":
            disc(0.5, -0.2, 0.82, 0)


def _star() -> list[tuple[float, float]]:
    spokes = [(1.12 if k % 2 == 0 else 0.46, math.pi * k / 5) for k in range(10)]
    return [(reach * math.sin(angle), 0.06 - reach * math.cos(angle)) for reach, angle in spokes]


def _heart() -> list[tuple[float, float]]:
    """Two half discs above a point."""
    lobe = [math.pi * k / 12 for k in range(13)]
    left = [(-0.5 - 0.52 * math.cos(a), -0.32 - 0.52 * math.sin(a)) for a in lobe]
    right = [(0.5 - 0.52 * math.cos(a), -0.32 - 0.52 * math.sin(a)) for a in lobe]
    return [*left, *right, (0.9, 0.12), (0.0, 1.0), (-0.9, 0.12)]


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    return [(u * c - v * s, u * s + v * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for u, v in quarter]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(0.0, -0.98), (1.06, 0.84), (-1.06, 0.84)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(0.32),
}
"""Polygons in units of the radius, y downwards; circle, ring and moon are made of discs."""
