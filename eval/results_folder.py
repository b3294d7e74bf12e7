"""What an evaluation leaves: its answers and scores.json in a folder, and a table on the screen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from blip import files
from blip.errors import DataError

_SCORES = "scores.json"
_BESIDE = ("results.json", "results.csv", "ranks.json", "captions.html")
"""What evaluations write beside the scores."""


class ResultsFolder:
    """The folder that `--out` names, made at once: hours of work come before what is written there. None is no folder.

    OSError if it cannot be made; DataError if files of such names are in it and no scores, as then they are somebody's.
    """

    def __init__(self, where: str | Path | None) -> None:
        self.where = Path(where) if where else None
        if self.where:
            self.where.mkdir(parents=True, exist_ok=True)
            others = [name for name in _BESIDE if (self.where / name).exists()]
            if others and not (self.where / _SCORES).exists():
                raise DataError(
                    f"{self.where / others[0]} would be written over, and no {_SCORES} beside it says that an "
                    "evaluation made it: give another --out, or move it away"
                )

    def __truediv__(self, name: str) -> Path:
        if not self.where:
            raise ValueError(f"{name} has no folder to be in")
        return self.where / name

    def write(self, name: str, content: str) -> None:
        """Leave a file, whole or not at all."""
        if self.where:
            files.replace_file(self.where / name, content.encode("utf-8", "replace"))

    def write_scores(self, *parts: Mapping[str, object]) -> None:
        """Leave scores.json: scores, counts, and the settings they depend on."""
        record = {name: value for part in parts for name, value in part.items()}
        self.write(_SCORES, json.dumps(record, indent=1) + "\n")


def settings_of(options: object, *names: str) -> dict[str, object]:
    """Those options that were given, for the record."""
    given = {name: getattr(options, name) for name in names}
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in given.items()
        if value is not None
    }


def listed(rows: Sequence[Mapping[str, object]]) -> str:
    """A JSON list with a row to a line."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def interval(scores: Mapping[str, float], name: str) -> str:
    """The 95% interval of a share, times 100, where scores have `name_low` and `name_high`; else nothing."""
    low, high = (scores.get(name + end) for end in ("_low", "_high"))
    return "" if low is None or high is None else f"   95% {100 * low:6.2f} to {100 * high:6.2f}"


def show(scores: Mapping[str, float], width: int = 16) -> None:
    """Print scores that are in percent, one a line."""
    for name, value in scores.items():
        print(f"{name:<{width}}{value:7.2f}")
