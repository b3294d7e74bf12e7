"""The models of a run, by its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable


def scorer_maker(device: str | None) -> Callable:
    """Return a function that loads the models of a run."""

    def make(run):
        config = run.config
        if config.scorer == "fake":
            from capfilt.score.scorer import FakeScorer

            seconds = float(os.environ.get("CAPFILT_FAKE_SECONDS", 0))
            return FakeScorer(config.seed, config.captions, config.itm_token, seconds)
        from capfilt.score.models import BlipScorer

        return BlipScorer.load(config, device)

    return make
