"""Streaming: shards read in sequence through a shuffle buffer, for sets too large to index, of any kind of sample.

Every worker of every process reads its own shards, endlessly. A resumed run does not continue at the same position: it
reshuffles with a key of (seed, first step), so samples of the interrupted epoch may be repeated or come later.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from blip.data.draws import ATTEMPTS, LEFT_OUT, PROBES, Prepare, Sample, check_process, too_many
from blip.data.formats.json_rows import CSV, Note, Row, rows_or_faults
from blip.data.formats.parquet import chosen_columns, parquet_file, rows_of
from blip.data.formats.remote import RemoteFile, SourceChanged, each, identity_of, remote_identities
from blip.data.formats.rows import columns_of
from blip.data.formats.sources import (
    CURE,
    FIRST_ROWS,
    Record,
    annotated,
    digest,
    format_of,
    log_notes,
    record,
    root_of,
    root_of_list,
    shard_files,
    shown_config,
    tar_record,
)
from blip.data.formats.splits import check_split, parts_of, refuse_split
from blip.data.formats.tars import Shard, check_whole, in_sequence
from blip.data.loader import Failure, Loader, Reading, guarded
from blip.data.settings import SourceConfig
from blip.errors import BadSample, DataError
from blip.keyed import Purpose, mix, permutation
from blip.objectives.batch import Bad, Batch


class Shards(Protocol):
    """The shard files of one source, each read from its beginning to its end."""

    config: Any
    """Settings of the source, of which path and weight matter here."""
    files: list[Path]
    rows: int
    """Number of records in all shards; an estimate if they are not counted."""

    def read(self, file: Path, part: int = 0, parts: int = 1) -> Iterator[Any]:
        """The records of a shard in order, or every `parts`-th from `part`; a Bad for what cannot be one.

        A record has a `key`. Raises DataError when the shard itself is unreadable.
        """

    def identity(self) -> str:
        """Fingerprint of this data: file names and sizes, and settings."""


class CaptionShards:
    """Captioned images in tar, parquet or JSON-lines files."""

    def __init__(self, config: SourceConfig, remote: bool = False):
        """Raise DataError unless the source is made of tar, parquet or JSON-lines files, local or with `remote` not."""
        self.config, self.format = shown_config(config), format_of(config, remote)
        if self.format not in ("tar", "parquet", "json"):
            raise DataError(f"source {config.path}: streaming reads tar, parquet and jsonl shards, not {self.format}")
        if self.format != "json":
            refuse_split(config.split, config.path, f"{self.format} sources")
        self.files = shard_files(config.path, self.format, remote)
        config = self.config
        if self.format == "json":
            root_of_list(config, self.files[0])
        else:
            root_of(config, self.files[0].parent)
        self.notes: list[str] = []
        """Notes for the user about the source, logged at the start."""
        self.rows = self._estimate()
        if not self.rows:
            raise DataError(f"source {config.path}: no rows in {self.files[0]}")

    def _estimate(self) -> int:
        """Rows of all shards: exact for parquet, from the first shard and the sizes for the others.

        Of parquet the columns of all shards are checked, of lists whether they have the splits asked for.
        """
        c = self.config
        if self.format == "parquet":
            files = list(each(parquet_file, self.files))
            for path, file in zip(self.files, files, strict=True):
                chosen_columns(file.schema_arrow, columns_of(c), path)
            return sum(file.metadata.num_rows for file in files)
        if self.format == "json":  # one mark in a CSV file may swallow many rows
            for file in (f for f in self.files[1:] if f.suffix.lower() in CSV):
                collections.deque(rows_or_faults(file), maxlen=0)
        sizes = [size.st_size for size in each(lambda f: f.stat(), self.files)]
        if self.format == "json" and c.split:
            rows, read = self._of_split()
            return round(rows * sum(sizes) / max(1, sum(sizes[:read])))
        first = self._first_tar() if self.format == "tar" else self._lines(self.files[0])
        return round(first * sum(sizes) / max(1, sizes[0]))

    def _first_tar(self) -> int:
        """Samples of the first shard, whose notes are logged, as those of all shards are if all are opened."""
        shard = self._shard(self.files[0])
        check_whole(f"source {self.config.path}", [shard.summary])
        log_notes([shard.summary])
        return len(shard)

    def _of_split(self) -> tuple[int, int]:
        """Count (rows in the requested split, files read): as few files as contain all of its names."""
        split = self.config.split
        seen: Counter[str] = Counter()
        rows = read = 0
        for file in self.files:
            read += 1
            rows += sum(1 for _ in self._annotated(file, self.notes.append, seen))
            if rows and seen.keys() >= set(parts_of(split)):
                break
        check_split(split, self.config.path, seen)
        for file in self.files[read:]:
            first = [row for _, row in itertools.islice(rows_or_faults(file), PROBES) if isinstance(row, dict)]
            if first and not any("split" in row for row in first):
                refuse_split(split, file, "its rows")
        return rows, read

    def _annotated(
        self, file: Path, note: Note | None = None, seen: Counter[str] | None = None
    ) -> Iterator[tuple[str | BadSample, list[str] | BadSample, int]]:
        return annotated(self.config, file, note, seen)

    def _shard(self, file: Path) -> Shard:
        return Shard(file, self.config.caption_column, allow_truncated=self.config.allow_truncated)

    def read(self, file: Path, part: int = 0, parts: int = 1) -> Iterator[Record | Bad]:
        """The records of a shard in order, or every `parts`-th from `part`; a Bad for what cannot be one.

        Raises DataError when the shard itself is unreadable.
        """
        for key, read in self._readers(file, part, parts):
            try:
                yield read()
            except BadSample as error:
                yield Bad(key, error.reason)

    def _readers(self, file: Path, part: int, parts: int) -> Iterator[tuple[str, Callable[[], Record]]]:
        if self.format == "tar":
            shard, column = self._shard(file), self.config.caption_column
            read = in_sequence(file) if isinstance(file, RemoteFile) else None
            for i in range(part, len(shard), parts):
                key = f"{file.name}/{shard.names[i]}"
                yield key, lambda i=i, key=key: tar_record(file, key, shard.image(i), shard.caption(i), column, read)
            return
        if self.format == "json":
            root = root_of_list(self.config, file)
            rows = self._annotated(file)
        else:
            root, opened = root_of(self.config, file.parent), parquet_file(file)
            image, caption = chosen_columns(opened.schema_arrow, columns_of(self.config), file)
            read = rows_of(opened, file, (image, caption))
            rows = ((values[image], values[caption], number) for number, values in enumerate(read))
        for image_value, captions, number in itertools.islice(rows, part, None, parts):
            key = f"{file.name}:{number}"
            yield key, lambda k=key, v=image_value, c=captions: record(k, v, c, root)

    def _lines(self, file: Path) -> int:
        if file.suffix == ".json" or file.suffix.lower() in CSV:
            return sum(1 for _ in self._annotated(file, self.notes.append))
        with file.open("rb") as lines:
            return sum(1 for line in lines if line.strip())

    def identity(self) -> str:
        c = self.config
        columns = (c.image_column, c.caption_column, c.weight)
        return json.dumps([columns, [identity_of(f) for f in self.files]])


class ListShards(ABC):
    """Files of rows (JSON lines, lists or CSV), which a kind of sample turns into records."""

    notes: Sequence[str] = ()

    def __init__(self, config: Any, files: list[Path]) -> None:
        """Raise DataError if the first file, from which the number of all rows is estimated, has none."""
        self.config, self.files = config, files
        sizes = [file.stat().st_size for file in files]
        first = sum(1 for _ in self.read(files[0]))
        self.rows = round(first * sum(sizes) / max(1, sizes[0]))
        if not self.rows:
            raise DataError(f"source {config.path}: no rows in {files[0]}")

    @abstractmethod
    def records(self, file: Path, number: int, row: Row) -> Sequence[Any]:
        """The records of a row; BadSample or DataError if it is invalid."""

    def read(self, file: Path, part: int = 0, parts: int = 1) -> Iterator[Any]:
        """Read a part of a file, as `Shards` does."""
        return itertools.islice(self._read(file), part, None, parts)

    def _read(self, file: Path) -> Iterator[Any]:
        for number, row in rows_or_faults(file):
            try:
                if isinstance(row, BadSample):
                    raise BadSample(f"the row {row.reason}")
                yield from self.records(file, number, row)
            except (BadSample, DataError) as error:
                yield Bad(f"{file.name}:{number}", str(error))

    def identity(self) -> str:
        """Fingerprint of this data, as of `Shards`."""
        config = dataclasses.asdict(self.config) | {"path": None, "image_root": None}
        return json.dumps([config, [identity_of(file) for file in self.files]])


class Stream:
    """Endless, shuffled records of shards, divided among all workers of all processes."""

    def __init__(self, shards: Sequence[Shards], prepare: Prepare, seed: int) -> None:
        """Raise DataError if nothing can be read or the texts are unknown to the tokenizer."""
        if not shards:
            raise DataError("no data: give at least one source")
        self.shards, self.prepare, self.seed = list(shards), prepare, seed
        self.left_out: frozenset[str] = frozenset()
        """Keys of samples that are replaced undecoded."""
        self.origins = prepare.examine(self._probe())
        """Origins of the images, by some of them."""

    def __len__(self) -> int:
        """Rows of all sources times their weights; an estimate, except for parquet."""
        return max(1, round(sum(s.rows * s.config.weight for s in self.shards)))

    def fingerprint(self) -> str:
        """Hash of shard names and sizes, and every setting that changes samples."""
        p = self.prepare
        settings = (*p.settings(), p.config.shuffle_buffer, p.transform.describe(), self.seed)
        return digest(self.shards, "stream", *settings, p.tokenizer.digest()) + p.suffix()

    def remote_files(self) -> dict[str, list[Any]]:
        """Size and tag of each remote file by its address, as they were at the start."""
        return remote_identities(self.shards)

    def _probe(self) -> Iterator[Any]:
        """Yield some records of each source. DataError if none of its first rows can be used."""
        each = max(1, PROBES // len(self.shards))
        for shards in self.shards:
            samples = list(itertools.islice(shards.read(shards.files[0]), max(each, FIRST_ROWS)))
            if samples and all(isinstance(one, Bad) for one in samples):
                first = f"{shards.files[0]}: {samples[0].key}: {samples[0].reason}"
                raise DataError(f"{first}, and no other of the first {len(samples)} rows can be used either; {CURE}")
            samples = samples[:each]
            if len(shards.files) > 1:  # which may be of another origin; its faults are left for the ledger
                with contextlib.suppress(BadSample, DataError, OSError):
                    samples += itertools.islice(shards.read(shards.files[-1]), each)
            yield from (one for one in samples if not isinstance(one, Bad))

    def records(self, consumer: int, consumers: int, start: int, world: int) -> Iterator[Any]:
        """The shuffled, endless records of one of the workers of all `world` processes."""
        buffer: list[Any] = []
        size = max(1, self.prepare.config.shuffle_buffer * world // consumers)
        for n, r in enumerate(self._mixed(consumer, consumers, start)):
            if len(buffer) < size:
                buffer.append(r)
                continue
            at = mix(self.seed, start, Purpose.SHUFFLE_BUFFER, consumer, n) % size
            buffer[at], r = r, buffer[at]
            yield r

    def _mixed(self, consumer: int, consumers: int, start: int) -> Iterator[Any]:
        """Records of the sources in proportion to their weighted sizes."""
        streams = [self._endless(s, consumer, consumers, start) for s in range(len(self.shards))]
        edges = np.cumsum([s.rows * s.config.weight for s in self.shards])
        for n in itertools.count():
            u = mix(self.seed, start, Purpose.SOURCE, consumer, n) / 2**64 * edges[-1]
            yield next(streams[min(int(np.searchsorted(edges, u, side="right")), len(streams) - 1)])

    def _endless(self, s: int, consumer: int, consumers: int, start: int) -> Iterator[Any]:
        shards = self.shards[s]
        for epoch in itertools.count():
            read, broken = 0, []
            for file, part, parts in self._share(s, epoch, consumer, consumers, start):
                try:
                    for r in shards.read(file, part, parts):
                        read += 1
                        yield r
                except SourceChanged:
                    raise
                except (DataError, OSError) as error:  # of one shard, met in the middle of a run
                    broken.append(Bad(file.name, f"the shard, or the rest of it, is left out: {error}"))
                    yield broken[-1]
            if not read and broken:
                raise DataError(f"source {shards.config.path}: no shard can be read; {broken[0].reason}")
            if not read:
                raise DataError(
                    f"source {shards.config.path}: reader {consumer} of {consumers} has nothing to read in "
                    f"{len(shards.files)} shards; use fewer workers, or more and smaller shards"
                )

    def _share(self, s: int, epoch: int, consumer: int, consumers: int, start: int) -> list[tuple[Path, int, int]]:
        """The (shard, part, parts) of a worker in an epoch: complete shards, or parts of one if there are too few."""
        files = self.shards[s].files
        order = permutation(len(files), self.seed, start, Purpose.SHARD_ORDER, s, epoch)
        if len(files) >= consumers:
            return [(files[i], 0, 1) for i in order[consumer::consumers]]
        turn, mine = divmod(consumer, len(files))
        parts = math.ceil((consumers - mine) / len(files))
        return [(files[order[mine]], turn, parts)]

    def leave_out(self, keys: frozenset[str]) -> None:
        """Replace some samples undecoded."""
        self.left_out = keys

    def batches(self, start: int, count: int, rank: int, world: int, batch_size: int) -> Loader:
        """Batches `start` to `start + count` - 1 of one process, each of exactly `batch_size` samples.

        Repeatable for the same start and workers.
        """
        check_process(rank, world)
        reading = Reading(self.prepare.config.workers)
        data = _Batches(self, reading, batch_size, rank, world, range(start, start + count))
        return Loader(data, data.name, count, self.prepare.config, reading)


class _Batches(IterableDataset):
    """Batches of one process, made by its workers in turn: the n-th by worker n % workers."""

    def __init__(
        self, stream: Stream, reading: Reading, batch_size: int, rank: int, world: int, numbers: range
    ) -> None:
        self.stream, self.reading, self.batch_size = stream, reading, batch_size
        self.rank, self.world, self.numbers = rank, world, numbers

    def __iter__(self) -> Iterator[Batch | Failure]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        consumer, consumers = self.rank * workers + worker, self.world * workers
        s, size, start = self.stream, self.batch_size, self.numbers.start
        samples = self._samples(s.records(consumer, consumers, start, self.world), consumer)
        for number in self.numbers[worker::workers]:
            self.reading.note("", number)
            yield guarded(
                lambda: s.prepare.collate(list(itertools.islice(samples, size))),
                lambda number=number: f"step {number}",
            )

    def _samples(self, records: Iterator[Any], consumer: int) -> Iterator[Sample]:
        s, bad = self.stream, []
        for n, r in enumerate(records):
            try:
                if isinstance(r, Bad):
                    bad.append(r)
                elif r.key in s.left_out:
                    bad.append(Bad(r.key, LEFT_OUT))
                else:
                    self.reading.note(r.key)
                    sample = s.prepare(r, (s.seed, self.numbers.start, consumer, n))
                    self.reading.note("")  # what follows is reading, and not this sample's
                    sample.bad, bad = bad, []
                    yield sample
            except BadSample as error:
                bad.append(Bad(r.key, error.reason))
            if len(bad) >= 4 * ATTEMPTS:
                raise too_many(bad)

    def name(self, worker: int) -> str:
        noted = self.reading.of(worker)
        return f"step {noted.step}" + f", {noted.key}" * bool(noted.key)
