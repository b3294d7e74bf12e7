"""Measure what a model can do, or score what it wrote.

    blip-eval captioning --references captions.json --results results.json --out runs/scores
    blip-eval captioning --model runs/caption/model --out runs/scores \\
        --source.path coco/dataset_coco.json --source.image_root coco --source.split test
    blip-eval retrieval --model runs/base/model \\
        --source.path coco/dataset_coco.json --source.image_root coco --source.split test
    blip-eval video_retrieval --model runs/retrieval/model --clips msrvtt_test.jsonl --video_root MSRVTT/videos
    blip-eval video_questions --model runs/vqa/model --questions msrvtt_test_qa.json --video_root MSRVTT/videos
    blip-eval classification --model runs/retrieval/model --source imagenet/val --names imagenet_names.json
    blip-eval vqa --model runs/vqa/model --out runs/scores --source.image_root coco \\
        --source.path v2_OpenEnded_mscoco_val2014_questions.json \\
        --source.annotations v2_mscoco_val2014_annotations.json
    blip-eval nlvr2 --model runs/nlvr2/model --source.path nlvr2/dev.json --out runs/scores
    blip-eval nlvr2 --results results.csv --source.path nlvr2/dev.json
    blip-eval nlvr --model runs/nlvr_boxes/model --source.path nlvr/dev/dev.json --source.part val
    blip-eval visdial --model runs/visdial/model --out runs/scores \\
        --source.path visdial_1.0_val.json --source.relevance visdial_1.0_val_dense_annotations.json

Each lists its options: blip-eval captioning --help. `torchrun ... -m eval captioning ...` shares the work.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from importlib import import_module
from typing import Any, NoReturn

from blip.app import exit, options

COMMANDS = {
    "captioning": ("Captioning", "eval.captioning_command"),
    "retrieval": ("Retrieval", "eval.retrieval_command"),
    "nlvr2": ("Nlvr", "eval.nlvr_command"),
    "nlvr": ("Nlvr", "eval.nlvr_command"),
    "visdial": ("Visdial", "eval.dialogue_command"),
    "vqa": ("Vqa", "eval.vqa_command"),
    "video_retrieval": ("VideoRetrieval", "eval.video_retrieval_command"),
    "video_questions": ("VideoQuestions", "eval.video_questions_command"),
    "classification": ("Classification", "eval.classification_command"),
}
"""The class of its options in eval.options, and the module whose `run` is called with them."""


def main(args: list[str] | None = None) -> int:
    """Carry out a command line, or the process's own; what does not fit ends the process with status 2."""
    args = sys.argv[1:] if args is None else args
    return exit.run(lambda: _measure(args))


def _measure(args: list[str]) -> None:
    name = options.verb("blip-eval", args, dict.fromkeys(COMMANDS, ""), __doc__)
    if name is not None:
        chosen = read(name, args[1:])
        import_module(COMMANDS[name][1]).run(chosen)


def read(name: str, args: list[str]) -> Any:
    """The options of one of COMMANDS; a preset lies under the `decode` options that are given. ValueError in a line."""
    kind = getattr(import_module("eval.options"), COMMANDS[name][0])
    under = functools.partial(_preset, kind) if hasattr(kind, "preset") else None
    return options.read(kind, args, f"blip-eval {name}", files=True, under=under)


def _preset(kind: type, given: options.Tree) -> options.Tree:
    from blip.inference.settings import DECODE_PRESETS

    return {"decode": dataclasses.asdict(DECODE_PRESETS[given.get("preset", kind.preset)])}


def command() -> NoReturn:
    """The program `blip-eval`."""
    exit.leave(main)


if __name__ == "__main__":
    command()
