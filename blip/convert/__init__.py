"""Weights of the 2022 release, of LAVIS, of transformers and of timm <-> ours, by explicit tables of names."""

from blip.convert.files import load, read_weights
from blip.convert.initial import architecture, initial_text, initial_vision
from blip.convert.layouts import (
    original_bare_matching,
    original_captioning,
    original_matching,
    original_nlvr,
    original_pretraining,
    original_training,
    original_vqa,
    transformers_captioning,
    transformers_matching,
    transformers_vqa,
)
from blip.convert.table import Row, Table, from_theirs, to_theirs

__all__ = [
    "Row",
    "Table",
    "architecture",
    "from_theirs",
    "initial_text",
    "initial_vision",
    "load",
    "original_bare_matching",
    "original_captioning",
    "original_matching",
    "original_nlvr",
    "original_pretraining",
    "original_training",
    "original_vqa",
    "read_weights",
    "to_theirs",
    "transformers_captioning",
    "transformers_matching",
    "transformers_vqa",
]
