"""Train a model, or tell a whole story.

    blip-recipe pretrain --config recipes/configs/pretrain_world.yaml
    blip-recipe caption --config recipes/configs/caption_world.yaml --train.steps 300
    accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_base.yaml       # several processes

Each lists its options: blip-recipe caption --help. What is called X here is also the module recipes.X.
"""

from __future__ import annotations

import sys
from importlib import import_module

from blip.app.exit import WRONG_USE, fail, run

RECIPES = ("pretrain", "caption", "retrieval", "vqa", "nlvr", "dialogue", "bootstrap", "demo")
"""Modules of this package with a `main` that reads the command line."""


def main(args: list[str] | None = None) -> None:
    """Carry out a command line, or the process's own; what does not fit ends the process with status 2."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nRecipes: {', '.join(RECIPES)}.")
        return
    if not args or args[0] not in RECIPES:
        problem = f"there is no {args[0]!r}" if args else "nothing is asked for"
        fail(f"{problem}; give one of {', '.join(RECIPES)} (blip-recipe --help explains)", WRONG_USE)
    recipe = import_module(f"recipes.{args[0]}")
    sys.argv = [f"blip-recipe {args[0]}", *args[1:]]
    run(recipe.main)


if __name__ == "__main__":
    main()
