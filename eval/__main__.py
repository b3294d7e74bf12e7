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
import itertools
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn, get_args, get_type_hints

from blip.app.exit import WRONG_USE, fail, leave, one_line, run, unknown_option

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
_STOPPED = 130
"""What a shell reports of a program that SIGINT ended."""


def main(args: list[str] | None = None) -> None:
    """Carry out a command line, or the process's own; what does not fit ends the process with status 2."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if not args or args[0] not in COMMANDS:
        said = f"there is no {args[0]!r}" if args else "nothing is asked for"
        fail(f"{said}; give one of {', '.join(COMMANDS)} (blip-eval --help explains)", WRONG_USE)
    options = read(args[0], args[1:])
    try:
        run(lambda: import_module(COMMANDS[args[0]][1]).run(options))
    except KeyboardInterrupt:
        raise SystemExit(_STOPPED) from None


def read(name: str, args: list[str]) -> Any:
    """The options of one of COMMANDS; what is off ends the process with status 2."""
    from jsonargparse import auto_cli, set_parsing_settings  # here, so that --help is quick

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    kind = getattr(import_module("eval.options"), COMMANDS[name][0])
    ways = {"prog": f"blip-eval {name}", "as_positional": False, "exit_on_error": False, "allow_abbrev": False}
    try:
        preset, defaults = _preset(kind, args)
        options = auto_cli(kind, args=args, set_defaults=defaults, **ways)
        if preset != getattr(options, "preset", None):
            raise ValueError("preset: give it as --preset NAME, not in the file of --config")
        return options
    except Exception as error:
        said = one_line(error)
        unknown = re.match(r"unrecognized arguments: (-\S+)", said)
        fail(unknown_option(unknown[1], _names(kind)) if unknown else _short(said), WRONG_USE)


def _preset(kind: type, args: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The preset that is asked for, and what it makes of the `--decode.` options that are not given."""
    from blip.inference.settings import DECODE_PRESETS

    if not hasattr(kind, "preset"):
        return None, {}
    given = [after for option, after in itertools.pairwise(args) if option == "--preset"]
    given += [arg.split("=", 1)[1] for arg in args if arg.startswith("--preset=")]
    preset = given[-1] if given else kind.preset
    values = dataclasses.asdict(DECODE_PRESETS[preset]) if preset in DECODE_PRESETS else {}
    return preset, {f"decode.{name}": value for name, value in values.items()}


def _names(kind: type, before: str = "--") -> Iterator[str]:
    """All options of a class, those of the classes in it too."""
    for name, inner in get_type_hints(kind).items():
        yield before + name
        for part in (inner, *get_args(inner)):
            if dataclasses.is_dataclass(part):
                yield from _names(part, f"{before}{name}.")


def _short(said: str) -> str:
    """Without the types that jsonargparse tried in vain."""
    found = re.match(r'Parser key "([^"]+)".*?Problem with given class_path \S+: (.*?): - Expected', said)
    return f"--{found[1]}: {found[2]}" if found else said


def command() -> NoReturn:
    """The program `blip-eval`."""
    leave(main)


if __name__ == "__main__":
    command()
