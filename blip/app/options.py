"""Options that sub-commands share. Light to import, as all is that `blip --help` needs."""

from __future__ import annotations

import argparse

MODEL_VARIABLE = "OPENBLIP_MODEL"
"""Environment variable with the model that is used where no --model is given."""


def add_images(parser: argparse.ArgumentParser) -> None:
    """The pictures, how many go through the model at once, and where the answers go."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="picture, folder of pictures (with its folders, linked ones too) or quoted glob",
    )
    add_answers(parser)


def add_answers(parser: argparse.ArgumentParser) -> None:
    """How and where the answers go, and how many pictures go through the model at once."""
    parser.add_argument("--json", action="store_true", help="answer in JSON lines")
    parser.add_argument("--out", metavar="FILE", help="answer into a file, or go on with it (default: standard output)")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="pictures at once (default: 16)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, where and how exactly it computes."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help=f"model folder, released .pth, or name on the hub (default: ${MODEL_VARIABLE})",
    )
    add_tokenizer(parser)
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, a GPU if there is one, else cpu)"
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of matrix products (default: auto, which is float32: an answer then does not depend on --batch; "
        "bfloat16 is faster and rounds differently for every batch size)",
    )


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """The tokenizer of a model that brings none."""
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="vocabulary for a model that brings none, as a .pth: vocab.txt, tokenizer.json, folder or name on the "
        "hub (default: what is beside the file, $OPENBLIP_TOKENIZER, or bert-base-uncased)",
    )


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)
