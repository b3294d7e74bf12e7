"""Sources of image-text pairs. A source gives a row's encoded image and captions; it never decodes.

Nothing that data says is fetched or executed: image paths are files under a folder that the user named, shards are
local files or, where the user allows it, behind addresses that the user named.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip import dist
from blip.data.formats import table
from blip.data.formats.finding import SourceFile, find, format_of
from blip.data.formats.finding import shard_files as shard_files
from blip.data.formats.folder import Downloaded, ImagesWithSidecars
from blip.data.formats.hosted import in_cache, load_parquet, open_dataset, rows_at
from blip.data.formats.json_rows import Note
from blip.data.formats.parquet import RowGroups, chosen_columns, parquet_file
from blip.data.formats.remote import RemoteFile, Unreachable, each, identity_of
from blip.data.formats.rows import FIRST_ROWS, NO_COLUMN, Columns, StoredRow, columns_of
from blip.data.formats.splits import check_split, refuse_split
from blip.data.formats.tars import Member, ReadMember, Shard, Summary, check_whole, members_of, read_member, sample_row
from blip.data.formats.values import captions_of, encodable, image_of
from blip.data.paths import check_name, check_spec, contained
from blip.data.settings import SourceConfig
from blip.errors import BadSample, DataError, shown, without_credentials

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16
_MOST_NOTES = 10
"""Notes on shards that are logged."""
CURE = "set image_column, caption_column or image_root, or repair the file"


@dataclass(frozen=True)
class Record:
    """One stored row."""

    key: str
    """Name `file:row` or `shard/member`, for messages and the ledger."""
    image: bytes | Path | Image.Image
    """Encoded, or where it is, or (from a source that draws) the image itself."""
    captions: list[str]
    """Captions, one or more; one of them is shown per epoch."""


class Source(Protocol):
    """Rows by number. `source[row]` raises BadSample for a row that cannot be used."""

    weight: float
    """Passes over this source in one epoch."""
    kind: str
    """human or web."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Record: ...

    def key(self, row: int) -> str:
        """The row's `Record.key`, without reading it."""

    def identity(self) -> str:
        """Fingerprint of this data: file names, sizes, row counts."""


# Rows -----------------------------------------------------------------------------------------------------------------


def root_of(config: SourceConfig, default: Path | None) -> Path | None:
    """The folder that image paths start from and must stay in; None for a remote file's if none is given."""
    if config.image_root is None:
        return None if default is None else Path(os.path.abspath(default))
    root = Path(check_spec(config.image_root))
    if not root.is_dir():
        raise DataError(f"source {config.path}: image_root {root} is not a folder")
    return Path(os.path.abspath(root))


def root_of_list(config: SourceConfig, file: Path | RemoteFile) -> Path:
    """The folder of the images that a list names, or of which `file` is the folder. DataError for a remote list without
    one.
    """
    root = root_of(config, file if file.is_dir() else file.parent)
    if root is None:
        raise DataError(
            f"source {file}: a list names image files, and those are read from this machine: set image_root to their "
            "folder, or use tar or parquet files, which hold the images"
        )
    return root


def record(key: str, image: Any, captions: Any, root: Path | None) -> Record:
    """A Record of column values: image bytes, a path, or {bytes, path}; a caption or a list. Raises BadSample."""
    image, texts = image_of(image), captions_of(captions)
    return Record(key, _contained_in_any(image, root) if isinstance(image, str) else image, texts)


def record_of(key: str, row: StoredRow, root: Path | None) -> Record:
    """The Record of a row; its path, if any, is relative to `root`. Raises BadSample if image or caption is missing."""
    for value in (row.image, row.captions):
        if isinstance(value, BadSample):
            raise value
    image = row.image if isinstance(row.image, bytes) else _contained_in_any(row.image, root)
    return Record(key, image, captions_of(row.captions) if not row.captions else row.captions)


# Lists ----------------------------------------------------------------------------------------------------------------


def annotated(
    config: SourceConfig, file: Path, note: Note | None = None, seen: Counter[str] | None = None
) -> Iterator[tuple[str | BadSample, list[str] | BadSample, int]]:
    """Yield (image path, captions, row number) of a file's rows in the requested split, with faults in their place."""
    for row in table.rows(file, columns_of(config), config.split, seen, note):
        yield row.image, row.captions, row.number


class ListedRows:
    """Annotation rows as two Arrow columns: some 100 bytes per row, shared with the workers instead of copied.

    An unusable row has the reason in place of its image, and no captions.
    """

    def __init__(self, config: SourceConfig, files: Sequence[SourceFile]):
        self.weight, self.kind = config.weight, config.kind
        self.files = [one.path for one in files]
        self._config = dataclasses.replace(config, split=None) if all(one.of_split for one in files) else config
        self.roots = [root_of_list(config, file) for file in self.files]
        self._contents: list[str] = []
        """Of folders of images with side-cars."""
        self.notes: list[str] = []
        """Notes for the user about the source, logged at the start."""
        seen: Counter[str] = Counter()
        blocks = list(_blocks(self._rows(files, seen), _BLOCK))
        check_split(self._config.split, config.path, seen)
        if not blocks:
            raise DataError(f"source {config.path}: no rows")
        self._images = pa.concat_arrays([b[0] for b in blocks])
        self._captions = pa.concat_arrays([b[1] for b in blocks])
        self._numbers = np.concatenate([b[2] for b in blocks])
        self._file_of = np.concatenate([b[3] for b in blocks])
        self._check_some_exist()

    def _read(self, one: SourceFile, seen: Counter[str]) -> Iterator[StoredRow]:
        if one.format == "imagefolder" and one.path.is_dir():
            refuse_split(self._config.split, self._config.path, "folders of images with side-cars")
            captioned = ImagesWithSidecars(one.path)
            self.notes += captioned.notes
            self._contents.append(captioned.identity())
            return captioned.rows(columns_of(self._config))
        if one.format != "files":
            return table.rows(one.path, columns_of(self._config), self._config.split, seen, self.notes.append)
        refuse_split(self._config.split, self._config.path, "parquet sources")
        return Downloaded(one.path, columns_of(self._config)).rows()

    def _rows(
        self, files: Sequence[SourceFile], seen: Counter[str]
    ) -> Iterator[tuple[str, list[str] | None, int, int]]:
        """Yield (image path, captions, row number, file number), or (reason, None, ...) for an unusable row.

        DataError if none of a file's first rows has a usable image, or no row is usable at all.
        """
        first, faults, usable = "", 0, 0
        for f, one in enumerate(files):
            leading = 0
            for row in self._read(one, seen):
                image, captions = row.image, row.captions
                fault = image.reason if isinstance(image, BadSample) else check_name(str(image), self.roots[f])
                leading = -1 if fault is None or leading < 0 else leading + 1
                reason = captions.reason if fault is None and isinstance(captions, BadSample) else fault
                if reason is None:
                    usable += 1
                    yield image, captions, row.number, f
                    continue
                first = first or f"{one.path}: row {row.number}: {reason}"
                faults += 1
                if leading == FIRST_ROWS:
                    raise DataError(
                        f"{one.path}: row {row.number}: {reason}, and no other of the first {FIRST_ROWS} rows can be "
                        f"used either; {CURE}"
                    )
                yield reason, None, row.number, f
        if faults and not usable:
            raise DataError(f"{first}, and no other row can be used either; {CURE}")
        if faults:
            of = f"{faults:,} of {faults + usable:,} rows"
            self.notes.append(f"source {self._config.path}: {of} cannot be used; the first is {first}")

    def _check_some_exist(self) -> None:
        """A wrong image_root is found at the start instead of after an epoch of replaced samples."""
        usable = np.flatnonzero(self._captions.is_valid().to_numpy(zero_copy_only=False))
        rows = usable[np.linspace(0, len(usable) - 1, min(16, len(usable)), dtype=np.int64)]
        paths = [self._root(int(row)) / self._images[int(row)].as_py() for row in rows]
        if not any(map(os.path.exists, paths)):
            raise DataError(
                f"source {self._config.path}: none of its images exists; {self.key(int(rows[0]))} is looked for at "
                f"{str(paths[0])[:300]}. Set image_root to the folder that the paths in the file start from"
            )

    def _root(self, row: int) -> Path:
        return self.roots[self._file_of[row]]

    def __len__(self) -> int:
        return len(self._images)

    def key(self, row: int) -> str:
        return f"{self.files[self._file_of[row]].name}:{self._numbers[row]}"

    def __getitem__(self, row: int) -> Record:
        image, captions = self._images[row].as_py(), self._captions[row].as_py()
        if captions is None:
            raise BadSample(image)
        return Record(self.key(row), contained(image, self._root(row)), captions)

    def identity(self) -> str:
        own = _identity([file for file in self.files if not file.is_dir()], len(self), self._config)
        return own + json.dumps(self._contents) if self._contents else own


def _blocks(rows: Iterable[tuple[str, list[str] | None, int, int]], size: int) -> Iterator[tuple]:
    """Rows in Arrow arrays of at most `size`, so that Python objects for only that many exist at once."""
    block: list[tuple[str, list[str] | None, int, int]] = []

    def built() -> tuple:
        images, captions, numbers, files = zip(*block, strict=True)
        return (
            pa.array(map(encodable, images), pa.large_string()),
            pa.array(captions, pa.large_list(pa.large_string())),
            np.array(numbers, np.int64),
            np.array(files, np.int32),
        )

    for row in rows:
        block.append(row)
        if len(block) == size:
            yield built()
            block.clear()
    if block:
        yield built()


def _identity(files: Sequence[Path], rows: int, config: SourceConfig) -> str:
    columns = (config.image_column, config.caption_column, config.split, config.weight, rows)
    return json.dumps([columns, [identity_of(f) for f in files]])


# datasets: parquet, saved data sets, the hub --------------------------------------------------------------------------


class Mapped:
    """A `datasets.Dataset`: memory-mapped Arrow that workers open by name."""

    def __init__(self, config: SourceConfig, data: datasets.Dataset, root: Path | None, files: Sequence[Path] = ()):
        import datasets

        self.weight, self.kind = config.weight, config.kind
        self._config, self._root, self._files = config, root, list(files)
        self._columns = chosen_columns(data.features.arrow_schema, columns_of(config), config.path)
        if not len(data):
            raise DataError(f"source {config.path}: no rows")
        rows = [parquet_file(f).metadata.num_rows for f in self._files]
        self._ends = np.cumsum(rows)
        self._roots = [root_of(config, file.parent) for file in self._files]
        image, caption = self._columns
        data = data.select_columns([image, *([caption] if caption else [])])
        if isinstance(data.features[image], datasets.Image):
            data = data.cast_column(image, datasets.Image(decode=False))
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def key(self, row: int) -> str:
        if not self._files:
            return f"{Path(self._config.path).name}:{row}"
        f = self._file_of(row)
        return f"{self._files[f].name}:{row - (int(self._ends[f - 1]) if f else 0)}"

    def _file_of(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def __getitem__(self, row: int) -> Record:
        try:
            values = self._data[int(row)]
        except Exception:  # a value that Python cannot hold, which is that row's fault
            values = next(rows_at(self._data, int(row), int(row) + 1))
        root = self._roots[self._file_of(row)] if self._roots else self._root
        image, caption = self._columns
        return record(self.key(row), values[image], caption and values[caption], root)

    def identity(self) -> str:
        features = str(self._data.features)
        return json.dumps([_identity(self._files, len(self), self._config), features, self._config.path])


class RemoteParquet:
    """Rows of remote parquet files by number: the row group of a row is read, and kept for its neighbours."""

    def __init__(self, config: SourceConfig, files: Sequence[RemoteFile]):
        self.weight, self.kind = config.weight, config.kind
        self.files, self._config = list(files), config
        opened = list(each(parquet_file, self.files))
        schemas = [one.schema_arrow for one in opened]
        self._columns = [chosen_columns(s, columns_of(config), f) for f, s in zip(files, schemas, strict=True)]
        self._root = root_of(config, None)
        self._ends = np.cumsum([one.metadata.num_rows for one in opened])
        self.notes = _large_groups(config, opened[0])
        if not len(self):
            raise DataError(f"source {config.path}: no rows")
        if any(columns.caption is None for columns in self._columns):
            raise DataError(f"source {config.path}: caption_column {NO_COLUMN!r} leaves no captions to learn from")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, row: int) -> tuple[int, int]:
        f = int(np.searchsorted(self._ends, row, side="right"))
        return f, row - (int(self._ends[f - 1]) if f else 0)

    def key(self, row: int) -> str:
        f, at = self._place(row)
        return f"{self.files[f].name}:{at}"

    def __getitem__(self, row: int) -> Record:
        f, at = self._place(int(row))
        try:
            with _reading:
                values = next(_row_groups(os.getpid(), self.files[f], self._columns[f]).values(at, at + 1))
        except Unreachable as error:
            raise BadSample(str(error)) from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.files[f]} is damaged: {str(error).splitlines()[0]}") from None
        image, caption = self._columns[f]
        return record(self.key(row), values[image], values[caption], self._root)

    def identity(self) -> str:
        return _identity(self.files, len(self), self._config)


_reading = threading.Lock()
_GROUPS_KEPT = 4
_LARGE_GROUP = 64 << 20
"""Bytes of a row group from which reading single rows of it is noted."""


@functools.lru_cache(_GROUPS_KEPT)
def _row_groups(process: int, file: RemoteFile, columns: Columns) -> RowGroups:
    """A file opened by a process; what another has opened is not used."""
    return RowGroups(parquet_file(file), columns)


def _large_groups(config: SourceConfig, first: pq.ParquetFile) -> list[str]:
    size = first.metadata.row_group(0).total_byte_size if first.metadata.num_row_groups else 0
    if size < _LARGE_GROUP:
        return []
    return [
        f"source {config.path}: row groups have {size >> 20} MB, and one is fetched for each sample that is drawn; set "
        "data.streaming to true, or write smaller row groups"
    ]


def _contained_in_any(name: str, root: Path | None) -> Path:
    """Under the root, or in the cache that `datasets` and the hub fill themselves."""
    if in_cache(name):
        return Path(os.path.realpath(name))
    if root is None:
        needs = f"image {shown(name)} is a path: set image_root to the folder that paths may start from"
        raise BadSample(check_name(name, "/") or needs)
    return contained(name, root)


def _open_parquet(config: SourceConfig, files: Sequence[Path | RemoteFile]) -> Mapped | RemoteParquet:
    remote = [file for file in files if isinstance(file, RemoteFile)]
    if remote and len(remote) < len(files):
        raise DataError(f"source {config.path}: parquet files here and behind addresses: give them as two sources")
    if remote:
        return RemoteParquet(config, remote)
    root = root_of(config, files[0].parent)
    columns = chosen_columns(parquet_file(files[0]).schema_arrow, columns_of(config), files[0])
    if columns.caption is None:
        raise DataError(f"source {config.path}: caption_column {NO_COLUMN!r} leaves no captions to learn from")
    return Mapped(config, load_parquet(files, *columns), root, files)


def _open_dataset(config: SourceConfig) -> Mapped:
    path = check_spec(config.path)
    root = root_of(config, Path(path)) if config.image_root or os.path.isdir(path) else None
    return Mapped(config, open_dataset(path, config.split), root)


# Tar shards -----------------------------------------------------------------------------------------------------------


class Tars:
    """Samples of tar shards by number; headers are read at the start, members when they are asked for."""

    def __init__(self, config: SourceConfig, files: Sequence[Path]):
        self.weight, self.kind = config.weight, config.kind
        self.files, self._config = list(files), config
        names, spans, is_json, of, summaries = [], [], [], [], []
        opened = each(lambda file: Shard(file, config.caption_column, allow_truncated=config.allow_truncated), files)
        for f, shard in enumerate(opened):
            names.append(pa.array(shard.names, pa.large_string()))
            spans.append(shard.spans())
            is_json.append(shard.is_json())
            of.append(np.full(len(shard), f, np.int32))
            summaries.append(shard.summary)
        self._names, self._spans = pa.concat_arrays(names), np.concatenate(spans)
        self._is_json, self._file_of = np.concatenate(is_json), np.concatenate(of)
        check_whole(f"source {config.path}", summaries)
        log_notes(summaries)

    def __len__(self) -> int:
        return len(self._names)

    def key(self, row: int) -> str:
        return f"{self.files[self._file_of[row]].name}/{self._names[row].as_py()}"

    def __getitem__(self, row: int) -> Record:
        at, size, text_at, text_size = (int(v) for v in self._spans[row])
        shard = self.files[self._file_of[row]]
        caption = Member(text_at, text_size), bool(self._is_json[row])
        return tar_record(shard, self.key(row), Member(at, size), caption, self._config.caption_column)

    def identity(self) -> str:
        return _identity(self.files, len(self), self._config)


def log_notes(shards: Sequence[Summary]) -> None:
    """Log notes on shards, the first few by name; in the main process only."""
    lines = [f"{shard.path}: {note}" for shard in shards for note in shard.notes]
    if lines and dist.is_main():
        more = f" (and {len(lines) - _MOST_NOTES} more such notes)" * (len(lines) > _MOST_NOTES)
        logger.warning("%s%s", "\n".join(lines[:_MOST_NOTES]), more)


def tar_record(
    shard: Path | RemoteFile,
    key: str,
    image: Member,
    caption: tuple[Member, bool],
    column: str,
    read: ReadMember | None = None,
) -> Record:
    """Read one sample of a shard, which `read` reads if it is open. Raises BadSample when a part is missing."""
    member, is_json = caption
    if read is None:
        remote = isinstance(shard, RemoteFile)
        read = members_of(shard, image, member) if remote else functools.partial(read_member, shard)
    image_member, caption_member = (one if one.size >= 0 else None for one in (image, member))
    text, json_member = (None, caption_member) if is_json else (caption_member, None)
    return record_of(key, sample_row(0, key, image_member, text, json_member, Columns("", column), read), None)


# Opening --------------------------------------------------------------------------------------------------------------


def open_source(config: SourceConfig, remote: bool = False) -> Source:
    """Open a source for access by number, with `remote` also one behind addresses.

    Raises DataError that says what is missing and what to set.
    """
    kind = format_of(config, remote)
    if kind == "dataset":
        return _open_dataset(config)
    source_files = find(config.path, "auto" if kind == "files" else kind, config.split, remote)
    config = shown_config(config)
    if kind not in ("parquet", "tar"):
        return ListedRows(config, source_files)
    refuse_split(config.split, config.path, f"{kind} sources")
    files = [one.path for one in source_files]
    return _open_parquet(config, files) if kind == "parquet" else Tars(config, files)


def shown_config(config: SourceConfig) -> SourceConfig:
    """A source's settings for messages, its files being known: without what may be secret in its addresses."""
    return dataclasses.replace(config, path=without_credentials(config.path))


def open_sources(configs: Sequence[SourceConfig], remote: bool = False) -> list[Source]:
    """Open all sources of a run, with `remote` also those behind addresses. Raises DataError if there are none."""
    if not configs:
        raise DataError("no data: give at least one source")
    return [open_source(c, remote) for c in configs]


def digest(sources: Sequence[Source], *settings: object) -> str:
    """A hash of the contents of sources and of settings that change their samples."""
    h = hashlib.sha256()
    for part in (*(s.identity() for s in sources), *map(str, settings)):
        h.update(part.encode() + b"\0")
    return h.hexdigest()[:32]
