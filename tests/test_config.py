"""Settings: no number is taken that cannot mean anything."""

import dataclasses
import inspect
import math
import typing

import pytest

import capfilt.calibrate.threshold
import capfilt.score.loop
import capfilt.select.policies
import capfilt.settings
from blip.data import settings as data
from blip.inference import settings as inference
from blip.models import settings as models
from blip.nn import settings as nn
from blip.objectives import caption, clip, pretrain, retrieval, teacher, vqa
from blip.train import settings as train
from blip.train import towers

GIVEN = {"path": "x", "part": "x", "policy": "fraction"}
"""Values without which a class cannot be made, or a field means nothing."""


def numbers():
    """Each field of a settings class that holds fractional numbers."""
    calibrate, score, select = capfilt.calibrate.threshold, capfilt.score.loop, capfilt.select.policies
    objectives = (caption, clip, pretrain, retrieval, teacher, vqa)
    ours = (nn, models, *objectives, data, train, towers, inference)
    for module in (*ours, calibrate, select, score, capfilt.settings):
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                for field, hint in typing.get_type_hints(kind).items():
                    kinds = {hint, *typing.get_args(hint)}
                    if float in kinds:
                        yield pytest.param(kind, field, typing.get_origin(hint) is tuple, id=f"{name}.{field}")


@pytest.mark.parametrize(("kind", "field", "pair"), list(numbers()))
def test_nan_is_refused_by_name(kind, field, pair):
    taken = {name: value for name, value in GIVEN.items() if name in {f.name for f in dataclasses.fields(kind)}}
    with pytest.raises(ValueError, match=field):
        kind(**taken | {field: (math.nan, math.nan) if pair else math.nan})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pretrain.PretrainConfig, {"temperature_min": 0.0}),
        (retrieval.RetrievalConfig, {"temperature_min": 0.6}),
        (pretrain.PretrainConfig, {"alpha_ramp_epochs": -1.0}),
        (data.DataConfig, {"max_unknown": 50.0}),
        (train.TrainConfig, {"betas": (0.9, 1.0)}),
        (train.TrainConfig, {"decay": 1.5}),
        (train.TrainConfig, {"epochs": math.inf}),
        (inference.DecodeConfig, {"length_penalty": math.inf}),
        (capfilt.calibrate.threshold.CalibrateOptions, {"target": 90.0}),
        (capfilt.score.loop.ScoreOptions, {"max_error_rate": 20.0}),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(kind, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        kind(**values)
