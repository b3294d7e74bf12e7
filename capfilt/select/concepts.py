"""Balance over concepts, as CLIP's data was made and MetaCLIP described it (arXiv 2309.16671).

A concept is one or several whole words. Of N wanted texts per concept, a text is kept with the probability
min(1, N / count) of its rarest concept, decided by the hash of its row's id; a text without a concept is dropped.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip.errors import DataError
from capfilt.run import Run
from capfilt.schema import USABLE
from capfilt.select.words import joined, words

_MOST = 5_000_000
"""Most different words and pairs counted at once; beyond that, those seen once so far are forgotten."""


class Concepts:
    """A list of concepts, and how to find them in a text: every n words in a row are looked up at once."""

    def __init__(self, names: Sequence[str]) -> None:
        """Make a list; a name without words is left out."""
        self.names: list[str] = []
        self._number: dict[str, int] = {}
        self._longest: dict[str, int] = {}
        """Most words of the concepts that begin with a word."""
        for name in names:
            some = words(name)
            if some and (key := " ".join(some)) not in self._number:
                self._number[key] = len(self.names)
                self.names.append(joined(some))
                self._longest[some[0]] = max(len(some), self._longest.get(some[0], 0))

    def of(self, text: str) -> set[int]:
        """Return the numbers of the concepts in a text, each once."""
        some = words(text)
        hits = set()
        for at, word in enumerate(some):
            for length in range(1, min(self._longest.get(word, 0), len(some) - at) + 1):
                number = self._number.get(word if length == 1 else " ".join(some[at : at + length]))
                if number is not None:
                    hits.add(number)
        return hits

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_concepts(where: str) -> Concepts:
    """Read concepts, one per line; what follows a tab, such as its count, is ignored. DataError if there are none."""
    path = Path(where).expanduser()
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"concepts {where}: there is no such file; `capfilt concepts RUN --out FILE` makes one"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"concepts {where}: it is not UTF-8 text, one concept per line") from None
    except OSError as error:
        raise DataError(f"concepts {where}: {error.strerror}") from None
    concepts = Concepts([line.partition("\t")[0] for line in lines])
    if not concepts.names:
        raise DataError(f"concepts {where}: no line has a word")
    return concepts


class Balance:
    """What keeps a sample of texts balanced over concepts."""

    def __init__(self, concepts: Concepts, per_concept: int) -> None:
        self.concepts, self.per_concept = concepts, per_concept
        self.counts = np.zeros(len(concepts.names), np.int64)
        self.kept = np.zeros(len(concepts.names), np.int64)

    def count(self, texts: Sequence[str]) -> None:
        """Count texts by concept."""
        for text in texts:
            for number in self.concepts.of(text):
                self.counts[number] += 1

    def judge(self, ids: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return which texts of rows with these ids have a concept, and which are kept: (T,) bool each."""
        from blip.keyed import Purpose, mix  # imports torch

        has, keep = np.zeros(len(texts), bool), np.zeros(len(texts), bool)
        for i, (row, text) in enumerate(zip(ids, texts, strict=True)):
            numbers = list(self.concepts.of(text))
            if numbers:
                rarest = int(self.counts[numbers].min())
                has[i] = True
                keep[i] = mix(Purpose.CONCEPTS, int(row[:16], 16), int(row[16:], 16)) * rarest < self.per_concept << 64
                if keep[i]:
                    self.kept[numbers] += 1
        return has, keep

    def account(self) -> dict[str, object]:
        """Return how many concepts there are, and the most frequent ones with their texts before and after."""
        most = sorted(range(len(self.counts)), key=lambda i: (-self.counts[i], self.concepts.names[i]))[:50]
        return {
            "listed": len(self.counts),
            "present": int((self.counts > 0).sum()),
            "over": int((self.counts > self.per_concept).sum()),
            "most": [[self.concepts.names[i], int(self.counts[i]), int(self.kept[i])] for i in most if self.counts[i]],
        }


# Making a list --------------------------------------------------------------------------------------------------------


def count_concepts(run: Run, sources: Sequence[str], least: int) -> tuple[list[tuple[str, int]], int]:
    """Count the texts with each word and each pair of neighbouring words, over all usable rows.

    Returns those in at least `least` texts, the most frequent first, and the number of texts.
    """
    counts: Counter[str] = Counter()
    total = 0
    for texts in _texts(run, sources):
        for text in texts:
            some = words(text)
            counts.update({*some, *map(" ".join, pairwise(some))})
        total += len(texts)
        if len(counts) > _MOST:
            counts = Counter({concept: n for concept, n in counts.items() if n > 1})
    chosen = [(concept, n) for concept, n in counts.items() if n >= least]
    return [(joined(c.split(" ")), n) for c, n in sorted(chosen, key=lambda one: (-one[1], one[0]))], total


def _texts(run: Run, sources: Sequence[str]) -> Iterator[list[str]]:
    columns = [f"{source}_text" for source in sources]
    for part in run.plan:
        if run.parts.exists(part.pid):
            table = run.parts.read(part.pid, ["status", *columns])
            table = table.filter(pc.is_in(table["status"], pa.array(USABLE)))
            for column in columns:
                yield [text for text in pc.list_flatten(table[column]).to_pylist() if text]
