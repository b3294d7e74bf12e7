"""Settings: no number is taken that cannot mean anything."""

import dataclasses
import inspect
import math
import typing

import pytest

import blip.config
import capfilt.calibrate
import capfilt.policies
import capfilt.score
import capfilt.settings

GIVEN = {"path": "x", "policy": "fraction"}
"""Values without which a class cannot be made, or a field means nothing."""


def numbers():
    """Each field of a settings class that holds fractional numbers."""
    for module in (blip.config, capfilt.calibrate, capfilt.policies, capfilt.score, capfilt.settings):
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
        (blip.config.PretrainConfig, {"temperature_min": 0.0}),
        (blip.config.RetrievalConfig, {"temperature_min": 0.6}),
        (blip.config.PretrainConfig, {"alpha_ramp_epochs": -1.0}),
        (blip.config.DataConfig, {"max_unknown": 50.0}),
        (blip.config.TrainConfig, {"betas": (0.9, 1.0)}),
        (blip.config.TrainConfig, {"decay": 1.5}),
        (blip.config.TrainConfig, {"epochs": math.inf}),
        (blip.config.DecodeConfig, {"length_penalty": math.inf}),
        (capfilt.calibrate.CalibrateOptions, {"target": 90.0}),
        (capfilt.score.ScoreOptions, {"max_error_rate": 20.0}),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(kind, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        kind(**values)
