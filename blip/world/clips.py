"""Video clips of the synthetic world: one thing moves from one side to the other, the others stay in place.

    python -m blip.world.clips --out runs/world-clips --split test --count 100

A clip is a pure function of (seed, split, i) and starts from a scene of that split; its captions and questions are
about what moves, and which way. Files are MP4 with lists in MSR-VTT's formats, so that the ordinary readers read them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count as numbers
from pathlib import Path
from typing import Any

from PIL import Image

from blip.data.clips import pyav
from blip.world.files import command_line
from blip.world.scene import COLOURS, SHAPES, Dice, Scene, Split, Thing, draw, scene

DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
"""Steps on the grid, y downwards."""
_MOVES = {
    "right": ("moves to the right", "moves from left to right", "goes to the right"),
    "left": ("moves to the left", "moves from right to left", "goes to the left"),
    "down": ("moves down", "moves from top to bottom", "goes down"),
    "up": ("moves up", "moves from bottom to top", "goes up"),
}
_NEARNESS = 0.9
"""Minimum distance from other things on the way, as a share of the sum of the radii."""
_CHECKS = 12
"""Number of intervals at whose ends the way must be clear."""


@dataclass(frozen=True)
class MovingScene:
    """A scene in which the thing `moving` crosses the image."""

    scene: Scene
    """Scene at the start of the clip."""
    moving: int
    direction: str
    seed: int
    split: str
    i: int

    @property
    def video_id(self) -> str:
        """The clip's name in files."""
        return f"world-clip-{self.seed}-{self.split}-{self.i:06d}"

    def at(self, moment: Fraction) -> Scene:
        """The scene at a moment from 0, the clip's start, to 1, its end."""
        things = list(self.scene.things)
        things[self.moving] = _moved(things[self.moving], self.direction, moment)
        return replace(self.scene, things=tuple(things))


def clip(seed: int, i: int, split: Split = "train") -> MovingScene:
    """Clip `i` of a split: one thing of one of the split's scenes moves."""
    dice = Dice("clip", seed, split, i)
    while True:
        made = scene(seed, dice.below(1 << 30), split)
        moves = [(moving, direction) for moving in range(len(made.things)) for direction in DIRECTIONS]
        for moving, direction in dice.shuffled(moves):
            things = list(made.things)
            things[moving] = _placed(things[moving], direction)
            begun = replace(made, things=tuple(things))
            candidate = MovingScene(begun, moving, direction, int(seed), split, int(i))
            if all(_clear(candidate.at(Fraction(step, _CHECKS)), moving) for step in range(_CHECKS + 1)):
                return candidate


def _placed(thing: Thing, direction: str) -> Thing:
    """The thing at the start of its move: at the side that it leaves."""
    across, down = DIRECTIONS[direction]
    column = thing.column if not across else (0 if across > 0 else 2)
    row = thing.row if not down else (0 if down > 0 else 2)
    x = thing.x if not across else (thing.radius + 10 if across > 0 else 990 - thing.radius)
    y = thing.y if not down else (thing.radius + 10 if down > 0 else 990 - thing.radius)
    return replace(thing, cell=3 * row + column, x=x, y=y)


def _moved(thing: Thing, direction: str, moment: Fraction) -> Thing:
    """The thing part of the way to the other side; lengths stay integers."""
    across, down = DIRECTIONS[direction]
    reach = round(moment * (980 - 2 * thing.radius))
    past = 2 * (moment > Fraction(1, 2))  # a grid of three has no finer steps
    row, column = thing.row + down * past, thing.column + across * past
    return replace(thing, cell=3 * row + column, x=thing.x + across * reach, y=thing.y + down * reach)


def _clear(made: Scene, moving: int) -> bool:
    thing = made.things[moving]
    return all(
        (thing.x - other.x) ** 2 + (thing.y - other.y) ** 2 >= (_NEARNESS * (thing.radius + other.radius)) ** 2
        for n, other in enumerate(made.things)
        if n != moving
    )


def frames(made: MovingScene, count: int, size: int = 64) -> list[Image.Image]:
    """Draw `count` (2 or more) frames of a clip from start to end: RGB, size x size pixels."""
    return [draw(made.at(Fraction(n, count - 1)), size) for n in range(count)]


def captions(made: MovingScene) -> list[str]:
    """Five true captions that differ in wording and in what they add, 4 to about 20 words, lower case."""
    dice = Dice("clip captions", made.seed, made.split, made.i)
    thing, moves = made.scene.things[made.moving], _MOVES[made.direction]
    others = [_a(_appearance(other)) for n, other in enumerate(made.scene.things) if n != made.moving]
    stays = f"while {' and '.join(others)} {'stays' if len(others) == 1 else 'stay'} in place"
    texts: list[str] = []
    while len(texts) < 5:
        what = _a(dice.choice((_appearance(thing), f"{thing.size} {_appearance(thing)}", f"{thing.colour} thing")))
        text = f"{what} {dice.choice(moves)}"
        if others and dice.chance(0.5):
            text += f" {stays}"
        if text not in texts:
            texts.append(text)
    return texts


def questions(made: MovingScene) -> list[tuple[str, str]]:
    """Questions about the movement and their answers: which way, what moves, its colour, how many, and two yes/no."""
    dice = Dice("clip questions", made.seed, made.split, made.i)
    thing = made.scene.things[made.moving]
    other = dice.choice([way for way in DIRECTIONS if way != made.direction])
    direction = made.direction if dice.chance(0.5) else other
    still = [_appearance(t) for n, t in enumerate(made.scene.things) if n != made.moving]
    named = _appearance(thing) if not still or dice.chance(0.5) else dice.choice(still)
    shapes = [t.shape for t in made.scene.things]
    pairs = [
        (f"which way does the {_appearance(thing)} move", made.direction),
        ("what colour is the thing that moves", thing.colour),
        ("what shape is the thing that moves", thing.shape),
        ("how many things are there", str(len(shapes))),
        (f"does something move {direction}", "yes" if direction == made.direction else "no"),
        (f"does the {named} move", "yes" if named == _appearance(thing) else "no"),
    ]
    return pairs


ANSWERS = (*DIRECTIONS, *COLOURS, *SHAPES, "1", "2", "3", "yes", "no")
"""All possible answers."""


def _appearance(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write(
    out: str | Path,
    split: Split = "test",
    count: int = 100,
    seed: int = 0,
    size: int = 64,
    length: int = 24,
    overwrite: bool = False,
) -> list[Path]:
    """Write clips as MP4 files with captions and questions; needs PyAV.

    videos/VIDEO_ID.mp4; SPLIT.json like MSR-VTT's {videos, sentences}; SPLIT_qa.json like MSR-VTT-QA's {video_id,
    question, answer, id}. On one machine the same settings give the same bytes.

    Args:
        out: Folder to write into; several splits may share one.
        split: train, val and test share no scene; composition shows colour-shape pairs that no other split has.
        count: Number of clips.
        seed: Random seed of the clips.
        size: Side of the frames in pixels; must be even.
        length: Frames per clip, at 8 per second.
        overwrite: Replace what an earlier call wrote for this split.

    Returns:
        The two lists. ValueError for invalid settings, FileExistsError if a list exists, DataError without PyAV.
    """
    out = Path(out)
    if count < 1 or length < 2 or size < 16 or size % 2:
        raise ValueError(
            "count must be 1 or more, length 2 or more, and size an even number of at least 16; "
            f"got {count}, {length} and {size}"
        )
    products = [out / f"{split}.json", out / f"{split}_qa.json"]
    if products[0].exists() and not overwrite:
        raise FileExistsError(f"{products[0]} already exists: give another --out, or --overwrite true to replace it")
    unfinished = out / f".writing-{split}-{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        videos, sentences, questions_of_clips = [], [], []
        for i in range(count):
            made = clip(seed, i, split)
            _encode(unfinished / f"{made.video_id}.mp4", frames(made, length, size))
            videos.append({"video_id": made.video_id, "split": split, "id": i})
            sentences += [{"video_id": made.video_id, "caption": text} for text in captions(made)]
            questions_of_clips += [{"video_id": made.video_id, "question": q, "answer": a} for q, a in questions(made)]
        (out / "videos").mkdir(exist_ok=True)
        for path in sorted(unfinished.iterdir()):
            path.replace(out / "videos" / path.name)
        _json(products[0], {"videos": videos, "sentences": [s | {"sen_id": n} for n, s in zip(numbers(), sentences)]})
        _json(products[1], [row | {"id": n} for n, row in zip(numbers(), questions_of_clips)])
    finally:
        shutil.rmtree(unfinished)
    return products


def _json(path: Path, value: Any) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    partial.write_text(json.dumps(value, indent=0) + "\n")
    partial.replace(path)


def _encode(path: Path, images: list[Image.Image]) -> None:
    av = pyav()
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = images[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 50 * images[0].size[0] ** 2
        stream.codec_context.thread_count = 1
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def main(args: list[str] | None = None) -> None:
    """The command line."""
    command_line(write, args)


if __name__ == "__main__":
    main()
