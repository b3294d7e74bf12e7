"""Sources mixed by weight in a keyed order: draw (epoch, index) -> record -> prepared sample -> batches by number.

A sample is a function of (seed, epoch, index) alone, so any worker, process or resumed run makes the same one. What a
kind of sample is made of is in blip.data.prepare. K images of a sample, S image side in pixels.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from blip.data.formats.remote import remote_identities
from blip.data.formats.sources import Source, digest
from blip.data.images import model_input
from blip.data.loader import Failure, Loader, Reading, guarded
from blip.data.settings import DataConfig
from blip.data.transforms import EvalTransform, TrainTransform
from blip.errors import BadSample, DataError
from blip.keyed import Purpose, mix, permutation
from blip.objectives.batch import Bad, Batch
from blip.origin import origins_of, union
from blip.tokenizer import Tokenizer

ATTEMPTS = 16
"""Most replacements tried for an unreadable sample before the run stops."""
LEFT_OUT = "left out: decoding it took too long before"
PROBES = 200
"""Number of records of which texts and origin are looked at when data is opened."""


@dataclass
class Sample:
    """One prepared record, ready to be put in a batch; a text is its word pieces, special tokens included."""

    images: Tensor
    """(3, S, S) as the transform gives it, or (K, 3, S, S) where a sample has several."""
    texts: list[list[int]]
    """Tokenized texts, one or more; their meaning depends on the kind of sample."""
    key: str
    """Name of the sample for messages and the ledger."""
    labels: list[float] = field(default_factory=list)
    """Numeric targets, if the objective has any."""
    image_id: int = 0
    """Number of the image, shared by all its records, for kinds with several records per image in a batch."""
    bad: list[Bad] = field(default_factory=list)
    """Unreadable samples that were tried before this one."""


@dataclass
class Prepare(ABC):
    """Make samples of one kind and batches of them: everything specific to a kind of data."""

    transform: TrainTransform | EvalTransform
    tokenizer: Tokenizer
    config: DataConfig

    @abstractmethod
    def __call__(self, record: Any, key: tuple[int, ...]) -> Sample:
        """Decode, augment and tokenize a record; all randomness is keyed by `key`. Raises BadSample."""

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate samples to the batch that the objective of this kind takes."""

    @abstractmethod
    def texts(self, record: Any) -> list[str]:
        """Some cleaned texts of a record, to try on the tokenizer. Raises BadSample."""

    def images(self, record: Any) -> Sequence[bytes | Path | Image.Image]:
        """The stored images of a record."""
        return [record.image]

    def settings(self) -> tuple[object, ...]:
        """Settings that change samples, apart from the transform's."""
        return self.config.prompt, self.config.max_words, self.config.max_tokens, self.config.max_pixels

    def suffix(self) -> str:
        """End of the data's fingerprint: settings that only this kind has."""
        return ""

    def image(self, stored: bytes | Path | Image.Image, *key: int, sided: bool) -> Tensor:
        """Decode and augment an image -> (3, S, S); `sided` images are not mirrored. Raises BadSample."""
        transform = self.transform
        return model_input(
            stored, self.config.max_pixels, lambda image: transform(image, *key, sided=sided), transform.at_least
        )

    def examine(self, records: Iterable[Any]) -> tuple[str, ...]:
        """Check the vocabulary on the texts of some records, and return the origins of their images (`blip.origin`)."""
        texts: list[str] = []
        origins: tuple[str, ...] = ()
        for record in records:
            with contextlib.suppress(BadSample):
                texts += self.texts(record)
                origins = union(origins, origins_of(self.images(record)))
        self.check_vocabulary(texts)
        return origins

    def check_vocabulary(self, texts: Sequence[str]) -> None:
        """Raise DataError when too large a share of the word pieces of some texts is unknown to the tokenizer."""
        tokenizer, limit = self.tokenizer, self.config.max_unknown
        rate = tokenizer.unknown_rate(texts)
        if rate > limit:
            raise DataError(
                f"{rate:.1%} of the word pieces of {len(texts)} texts are unknown to tokenizer {tokenizer.where} "
                f"(e.g. {texts[0][:60]!r}); the limit is data.max_unknown = {limit:.1%}. Is it the right vocabulary?"
            )


class Draws(Dataset):
    """Samples by draw, with unreadable ones replaced by others of the same source."""

    def __init__(self, sources: Sequence[Source], prepare: Prepare, seed: int) -> None:
        """Raise DataError if there is no data, or the texts are unknown to the tokenizer."""
        if not sources or not all(len(s) for s in sources):
            raise DataError("no data: every source must have at least one row")
        self.sources, self.prepare, self.seed = list(sources), prepare, seed
        self.left_out: frozenset[str] = frozenset()
        """Keys of samples that are replaced unread."""
        self._starts = np.cumsum([0, *(len(s) for s in sources)])
        self._shown = [max(1, round(s.weight * len(s))) for s in sources]
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        self.origins = prepare.examine(self._probe())
        """Origins of the images, by some of them."""

    @property
    def rows(self) -> int:
        """Rows of all sources together."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return sum(self._shown)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_order": None}  # workers are told what to draw

    def order(self, epoch: int) -> np.ndarray:
        """The draws of an epoch, (len(self),) int64: row numbers over all sources, in a keyed order.

        A source of weight 0.5 shows one half in one epoch and the other in the next. Where a source shows a row a
        second time, `rows` is added, so that the second showing is augmented in another way.
        """
        return self._order(epoch)

    def _make_order(self, epoch: int) -> np.ndarray:
        draws = np.concatenate([self._drawn(s, epoch) for s in range(len(self.sources))])
        return draws[permutation(len(draws), self.seed, Purpose.EPOCH_ORDER, epoch)]

    def _drawn(self, s: int, epoch: int) -> np.ndarray:
        """Rows of source s in an epoch: a window of an endless sequence of permutations."""
        n, shown = len(self.sources[s]), self._shown[s]
        first, parts = epoch * shown, []
        for number in range(first // n, (first + shown - 1) // n + 1):
            low, high = max(first, number * n) - number * n, min(first + shown, (number + 1) * n) - number * n
            whole = high - low == n
            rows = np.arange(n) if whole else permutation(n, self.seed, Purpose.ROW_ORDER, s, number)[low:high]
            parts.append(rows + (number - first // n) * self.rows)
        return np.concatenate(parts) + self._starts[s]

    def _locate(self, index: int) -> tuple[int, int]:
        row = index % self.rows
        s = int(np.searchsorted(self._starts, row, side="right")) - 1
        return s, row - int(self._starts[s])

    def key(self, index: int) -> str:
        """Key of the sample of a draw, without reading it."""
        s, row = self._locate(index)
        return self.sources[s].key(row)

    def __getitem__(self, draw: tuple[int, int]) -> Sample:
        """Read the draw (epoch, index), or its replacement, which is keyed in the same way.

        Raises DataError when `ATTEMPTS` samples in a row are unreadable.
        """
        return self.read(draw, lambda key: None)

    def read(self, draw: tuple[int, int], note: Callable[[str], None]) -> Sample:
        """Read as `self[draw]`; `note` is called with the key of each sample before it is read."""
        epoch, index = (int(v) for v in draw)
        s, row = self._locate(index)
        source, bad = self.sources[s], []
        for attempt in range(ATTEMPTS):
            key, name = (self.seed, epoch, index, attempt), source.key(row)
            try:
                if name in self.left_out:
                    raise BadSample(LEFT_OUT)
                note(name)
                sample = self.prepare(source[row], key)
                sample.bad = bad
                return sample
            except BadSample as error:
                bad.append(Bad(name, error.reason))
            row = mix(Purpose.REPLACEMENT, *key) % len(source)
        raise too_many(bad)

    def _probe(self) -> Iterator[Any]:
        """Yield some records, evenly spread; unreadable ones are left for the ledger."""
        for source in self.sources:
            for row in np.linspace(0, len(source) - 1, min(len(source), max(1, PROBES // len(self.sources)))):
                with contextlib.suppress(BadSample):
                    yield source[int(row)]

    def fingerprint(self) -> str:
        """Hash of file names, sizes, row counts, and every setting that changes samples."""
        p = self.prepare
        settings = (*p.settings(), p.transform.describe(), self.seed)
        return digest(self.sources, *settings, p.tokenizer.digest()) + p.suffix()

    def remote_files(self) -> dict[str, list[Any]]:
        """Size and tag of each remote file by its address, as they were at the start."""
        return remote_identities(self.sources)

    def leave_out(self, keys: frozenset[str]) -> None:
        """Replace some samples unread."""
        self.left_out = keys

    def batches(self, start: int, count: int, rank: int, world: int, batch_size: int) -> Loader:
        """Batches `start` to `start + count` - 1 of process `rank` of `world`, each of exactly `batch_size` samples.

        Batch b of process r holds positions (b * world + r) * batch_size ... of the endless stream whose position p is
        draw p % N of epoch p // N. The global random generators are never consumed.
        """
        reading = Reading(self.prepare.config.workers)
        data, places = _Batches(self, reading), _Places(self, start, count, rank, world, batch_size)
        return Loader(data, data.name, count, self.prepare.config, reading, places)


class _Batches(Dataset):
    """Draws -> Batch or Failure, in a worker."""

    def __init__(self, draws: Draws, reading: Reading) -> None:
        self.draws, self.reading = draws, reading

    def __getitems__(self, draws: list[tuple[int, int]]) -> Batch | Failure:
        d = self.draws
        return guarded(lambda: d.prepare.collate([d.read(draw, self.reading.note) for draw in draws]), self._where)

    def _where(self) -> str:
        info = get_worker_info()
        return self.name(info.id if info else 0)

    def name(self, worker: int) -> str:
        return self.reading.of(worker).key or "its first sample"


class _Places:
    """The (epoch, index) of each sample of some batches of one process; can be iterated repeatedly."""

    def __init__(self, draws: Draws, start: int, count: int, rank: int, world: int, batch_size: int) -> None:
        check_process(rank, world)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.draws, self.batch_size, self.rank, self.world = draws, batch_size, rank, world
        self.numbers = range(start, start + count)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, self.numbers)

    def batch(self, number: int) -> list[tuple[int, int]]:
        n, first = len(self.draws), (number * self.world + self.rank) * self.batch_size
        return [(p // n, int(self.draws.order(p // n)[p % n])) for p in range(first, first + self.batch_size)]


def too_many(bad: Sequence[Bad]) -> DataError:
    """Error for samples in a row that are all unreadable."""
    listed = "; ".join(f"{b.key}: {b.reason}" for b in bad[:3])
    return DataError(f"{len(bad)} samples in a row are unreadable, the first: {listed}")


def check_process(rank: int, world: int) -> None:
    """Raise ValueError for an invalid rank."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} processes")
