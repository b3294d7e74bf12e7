"""Write images of the synthetic world into one folder per class, for zero-shot classification.

    python -m blip.world.classes --out runs/world-shapes --by shape --count 200

Scenes show a single thing, so that an image has one right class; the same settings give the same bytes.
"""

from __future__ import annotations

import os
import shutil
from itertools import count as numbers
from pathlib import Path
from typing import Literal

from blip.world.files import command_line, jpeg
from blip.world.scene import COLOURS, SHAPES, Scene, Split, draw, scene

CLASSES = {"shape": SHAPES, "colour": tuple(COLOURS)}
TEMPLATES = {
    "shape": ("a {}", "a picture of a {}", "there is a {}", "one shape: a {}"),
    "colour": ("something {}", "a {} shape", "a picture of a {} thing", "one thing, {}"),
}
"""Prompt templates worded like the world's captions."""


def write(
    out: str | Path,
    by: Literal["shape", "colour"] = "shape",
    split: Split = "test",
    count: int = 200,
    seed: int = 0,
    size: int = 64,
) -> list[Path]:
    """Write an imagefolder: OUT/CLASS/*.jpg, and OUT/templates.txt with prompt templates.

    Args:
        out: Folder to write; must not exist.
        by: Class of an image: the shape of its one thing, or its colour.
        split: train, val and test share no scene; composition shows colour-shape pairs that no other split has.
        count: Number of images in all; classes differ in size.
        seed: Random seed of the scenes.
        size: Side of the images in pixels.

    Returns:
        The folders of the classes. ValueError for a count or size below 1, FileExistsError if `out` exists.
    """
    out = Path(out)
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be 1 or more, got {count} and {size}")
    if out.exists():
        raise FileExistsError(f"{out} already exists: give another --out")
    unfinished = out.with_name(f".writing-{out.name}-{os.getpid()}")
    try:
        for name in CLASSES[by]:
            (unfinished / name).mkdir(parents=True)
        for made in single(seed, split, count):
            (thing,) = made.things
            path = unfinished / getattr(thing, by) / f"{made.image_id}.jpg"
            path.write_bytes(jpeg(draw(made, size)))
        (unfinished / "templates.txt").write_text("\n".join(TEMPLATES[by]) + "\n")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [out / name for name in CLASSES[by]]


def single(seed: int, split: Split, count: int) -> list[Scene]:
    """The first `count` scenes of a split that show one thing."""
    scenes: list[Scene] = []
    for i in numbers():
        made = scene(seed, i, split)
        if len(made.things) == 1:
            scenes.append(made)
        if len(scenes) == count:
            return scenes
    raise AssertionError


def main(args: list[str] | None = None) -> None:
    """The command line."""
    command_line(write, args)


if __name__ == "__main__":
    main()
