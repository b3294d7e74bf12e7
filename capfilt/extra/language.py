"""The language of captions, by the package py3langid: 97 languages, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from blip.files import sha256
from capfilt.extra.scorer import RowTexts

_LEAST = 0.05
"""Probability below which the model has recognised nothing in a text."""


class Language:
    """Codes of ISO 639-1 and their probabilities; none for a text without letters or in which nothing is recognised."""

    name = "language"
    side = 0
    columns = {  # noqa: RUF012
        "web": pa.list_(pa.string()),
        "web_probability": pa.list_(pa.float32()),
        "syn": pa.list_(pa.string()),
        "syn_probability": pa.list_(pa.float32()),
    }

    def __init__(self) -> None:
        """Load the model. ValueError, with the command to install it, if the package is missing."""
        try:
            from py3langid import langid

            path = Path(langid.__file__).parent / langid.MODEL_FILE
            self._identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        except (ImportError, AttributeError):
            raise ValueError("--also language needs a package: run `pip install 'py3langid>=0.4'`") from None
        self.identity = {"py3langid": version("py3langid"), "sha256": sha256(path)}

    def score(self, images: Sequence[np.ndarray], texts: Sequence[RowTexts]) -> dict[str, list]:
        """Classify each text by itself."""
        columns: dict[str, list] = {name: [] for name in self.columns}
        for row in texts:
            for kind in ("web", "syn"):
                given = [self._classify(text) for text in getattr(row, kind)]
                columns[kind].append([code for code, _ in given])
                columns[f"{kind}_probability"].append([probability for _, probability in given])
        return columns

    def _classify(self, text: str) -> tuple[str | None, float | None]:
        if not any(map(str.isalpha, text)):
            return None, None
        code, probability = self._identifier.classify(text)
        return (code, float(probability)) if probability >= _LEAST else (None, None)
