"""Train a model, or run a whole experiment.

    blip-recipe pretrain --config recipes/configs/pretrain_world.yaml
    blip-recipe caption --config recipes/configs/caption_world.yaml --train.steps 300
    accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_base.yaml       # several processes

List the options of a recipe with, say, blip-recipe caption --help. Recipe X is also the module recipes.X.
"""

from __future__ import annotations

import sys
from importlib import import_module

from blip import options
from blip.app import exit

RECIPES = {
    "pretrain": "pre-train on image-text pairs: ITC, ITM and LM with a momentum teacher",
    "caption": "fine-tune a captioner",
    "retrieval": "fine-tune for retrieval, or a filter for CapFilt",
    "vqa": "fine-tune for visual question answering",
    "nlvr": "fine-tune for sentences about several images",
    "dialogue": "fine-tune for visual dialogue",
    "bootstrap": "measure what captioning and filtering a crawl are worth, row by row of the paper's table",
    "demo": "pre-train on a noisy crawl, clean it with CapFilt, pre-train on the result",
}
"""Modules of this package with a `main` that reads the command line, and the purpose of each."""


def main(args: list[str] | None = None) -> int:
    """Run a command line, the process's own by default; wrong usage ends the process with status 2."""
    args = sys.argv[1:] if args is None else args
    return exit.run(lambda: _carry_out(args))


def _carry_out(args: list[str]) -> None:
    name = options.verb("blip-recipe", args, RECIPES, __doc__)
    if name is not None:
        recipe = import_module(f"recipes.{name}")
        sys.argv = [f"blip-recipe {name}", *args[1:]]
        recipe.main()


if __name__ == "__main__":
    sys.exit(main())
