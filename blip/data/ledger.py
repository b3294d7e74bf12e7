"""The list of a run's unreadable samples, each once, with its reason, and a limit on their share.

A sample on which decoding got stuck is listed, too, and is left out when the run continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from blip import files
from blip.errors import TooManyBad
from blip.objectives.batch import Bad

_MINIMUM = 200
"""Number of samples before which the share of bad ones is not checked."""


class Ledger:
    """A JSON-lines file of {key, reason} to append to; a run that continues reads its earlier entries.

    Each process of a run has its own file, `bad_samples-RANK.jsonl`, and reads from all of them which samples are left
    out.
    """

    def __init__(self, path: str | Path, max_bad_fraction: float = 0.05):
        self.path, self.max_bad_fraction = Path(path), max_bad_fraction
        self._reasons: dict[str, str] = {}
        self._bad_draws = 0
        self._torn = False  # whether the last line was cut off
        self.left_out: frozenset[str] = frozenset()
        """Keys of samples that must not be decoded."""
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            self._torn = bool(text) and not text.endswith("\n")
            self._reasons = {entry["key"]: entry["reason"] for entry in _entries(text)}
        for path in {self.path, *self.path.parent.glob("bad_samples-*.jsonl")}:
            if not path.exists():
                continue
            entries = _entries(path.read_text(encoding="utf-8", errors="replace"))
            self.left_out |= {entry["key"] for entry in entries if entry.get("left_out")}

    def __len__(self) -> int:
        """Number of different bad samples so far."""
        return len(self._reasons)

    def __contains__(self, key: str) -> bool:
        return key in self._reasons

    def add(self, bads: Iterable[Bad], seen: int) -> None:
        """Record bad samples; `seen` is the number of good ones in this process since this object was made.

        Raises TooManyBad if the share of bad samples among all drawn exceeds the limit, and files.WriteError if the
        disk is full.
        """
        bads = list(bads)
        self._bad_draws += len(bads)
        draws = seen + self._bad_draws
        new = {b.key: b.reason for b in bads if b.key not in self._reasons}
        if new:
            self._append(new)
            self._reasons.update(new)
        if draws >= _MINIMUM and self._bad_draws > self.max_bad_fraction * draws:
            raise TooManyBad(self._message(draws))

    def leave_out(self, key: str, reason: str) -> None:
        """Record a sample to leave out whenever the run continues."""
        self._append({key: reason}, left_out=True)
        self._reasons[key] = reason
        self.left_out |= {key}

    def _append(self, new: dict[str, str], **more: bool) -> None:
        text = "\n" * self._torn + "".join(json.dumps({"key": k, "reason": r, **more}) + "\n" for k, r in new.items())
        with files.explain_write(self.path, len(text)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        self._torn = False

    def _message(self, draws: int) -> str:
        first = "; ".join(f"{k}: {r}" for k, r in list(self._reasons.items())[:3])
        return (
            f"{self._bad_draws} of {draws} samples drawn ({self._bad_draws / draws:.1%}) are unreadable, "
            f"more than data.max_bad_fraction = {self.max_bad_fraction:.1%}; the first: {first}. "
            f"All {len(self)} are in {self.path}. Repair them, or raise data.max_bad_fraction"
        )


def _entries(text: str) -> Iterator[dict]:
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:  # empty, or the last line of a run that was killed while it wrote
            continue
        yield entry
