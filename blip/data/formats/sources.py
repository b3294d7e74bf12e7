"""Where image-text pairs come from. A source gives a row's encoded picture and captions; it never decodes.

Nothing that data says is fetched or executed: image paths are files under a folder that the user named, shards are
local files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from blip import dist
from blip.data.formats.hosted import in_cache, load_parquet, open_dataset, rows_at
from blip.data.formats.json_rows import Note, Row, rows_or_faults
from blip.data.formats.parquet import check_columns, parquet_file
from blip.data.formats.splits import check_split, of_split, refuse_split
from blip.data.formats.tars import Member, Shard, Summary, check_whole, read_member
from blip.data.formats.values import captions_of, encodable, image_of
from blip.data.images import MAX_BYTES
from blip.data.paths import alternatives, check_name, check_spec, contained, is_pattern, present
from blip.data.settings import SourceConfig
from blip.errors import BadSample, DataError, shown

logger = logging.getLogger(__name__)

_ENDINGS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "json", ".tsv": "json", ".parquet": "parquet"}
_ENDINGS |= {".tar": "tar"}
_BLOCK = 1 << 16
_TOLD = 10
"""Notes on shards that are logged."""
FIRST_ROWS = 64
"""Rows of a file of which one must be usable; where none is, the columns or the root are wrong."""
CURE = "set image_column, caption_column or image_root, or repair the file"


@dataclass(frozen=True)
class Record:
    """One row as it is stored."""

    key: str
    """`file:row` or `shard/member`, for people and for the ledger."""
    image: bytes | Path | Image.Image
    """Encoded, or where it is, or (from a source that draws) the picture itself."""
    captions: list[str]
    """One or more; one of them is shown per epoch."""


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
        """What tells this data from other data: file names, sizes, row counts."""


# Paths ----------------------------------------------------------------------------------------------------------------


def together(files: Sequence[Path]) -> Path:
    """The folder that some files have in common."""
    return Path(os.path.commonpath([os.path.abspath(f.parent) for f in files]))


def root_of(config: SourceConfig, default: Path) -> Path:
    """The folder that image paths start from and must stay in."""
    if config.image_root is None:
        return Path(os.path.abspath(default))
    root = Path(check_spec(config.image_root))
    if not root.is_dir():
        raise DataError(f"source {config.path}: image_root {root} is not a folder")
    return Path(os.path.abspath(root))


# Rows of {image, caption} ---------------------------------------------------------------------------------------------


def annotated(
    config: SourceConfig,
    file: Path,
    root: Path,
    columns: tuple[str, str],
    note: Note | None = None,
    seen: Counter[str] | None = None,
) -> Iterator[tuple[str | BadSample, list[str], int]]:
    """(image path from `root` on, captions, row number) of a file's rows of the split asked for that have captions.

    In place of the path, what is wrong with a row that cannot be used. An empty list of captions is an image without
    pairs, which is left out. `seen` counts the splits there are.
    """
    folder = "." if config.image_root else os.path.relpath(os.path.abspath(file.parent), root)
    seen = Counter() if seen is None else seen
    for number, row in of_split(rows_or_faults(file, note), config.split, file, seen):
        try:
            if isinstance(row, BadSample):
                raise BadSample(f"the row {row.reason}")
            image, captions = pair(row, *columns)
            image = image if folder == "." or os.path.isabs(image) else f"{folder}/{image}"
            if captions:
                yield image, captions, number
        except BadSample as error:
            yield error, [], number


def pair(row: Row, image_column: str, caption_column: str) -> tuple[str, list[str]]:
    """(image path, captions) of an annotation row. Raises BadSample; an empty list of captions is none."""
    image, captions = image_of(_value(row, image_column)), _value(row, caption_column)
    return str(image), [] if captions == [] else captions_of(captions)


def _value(row: Row, column: str) -> Any:
    """What a row has in a column; BadSample that lists those it has if it has no such column."""
    if column not in row:
        raise BadSample(f"the row has no {column!r} (it has: {', '.join(sorted(map(str, row)))[:200] or 'nothing'})")
    return row[column]


def columns_of(file: Path) -> set[str]:
    """The columns that any of a file's first rows has."""
    first = itertools.islice(rows_or_faults(file), FIRST_ROWS)
    return {str(name) for _, row in first if isinstance(row, dict) for name in row}


class Table:
    """Annotation rows as two Arrow columns: some 100 bytes a row, shared with the workers instead of copied.

    A row that cannot be used has the reason in place of its image, and no captions.
    """

    def __init__(self, config: SourceConfig, files: Sequence[Path], root: Path, columns: tuple[str, str]):
        self.weight, self.kind = config.weight, config.kind
        self.root, self.files, self._config, self._columns = root, list(files), config, columns
        self.notes: list[str] = []
        """What is to be said about the source at the start."""
        self.linked: list[str] = []
        """Real paths of folders outside the root whose images may be opened as well."""
        seen: Counter[str] = Counter()
        blocks = list(_blocks(self._rows(seen), _BLOCK))
        check_split(config.split, f"source {config.path}", seen)
        if not blocks:
            raise DataError(f"source {config.path}: no rows" + " with captions" * bool(config.split))
        self._images = pa.concat_arrays([b[0] for b in blocks])
        self._captions = pa.concat_arrays([b[1] for b in blocks])
        self._numbers = np.concatenate([b[2] for b in blocks])
        self._file_of = np.concatenate([b[3] for b in blocks])
        self._check_some_exist()

    def _rows(self, seen: Counter[str]) -> Iterator[tuple[str, list[str] | None, int, int]]:
        """(image path, captions, row number, number of the file); (reason, None, ...) for a row that cannot be used.

        DataError if none of a file's first rows can be used, or none at all.
        """
        first, faults, usable = "", 0, 0
        for f, file in enumerate(self.files):
            before, leading = usable, 0
            rows = annotated(self._config, file, self.root, self._columns, self.notes.append, seen)
            for image, captions, number in rows:
                reason = image.reason if isinstance(image, BadSample) else check_name(image, self.root)
                if reason is None:
                    usable += 1
                    yield image, captions, number, f
                    continue
                first = first or f"{file}: row {number}: {reason}"
                faults, leading = faults + 1, leading + (usable == before)
                if leading == FIRST_ROWS:
                    raise DataError(
                        f"{file}: row {number}: {reason}, and no other of the first {FIRST_ROWS} rows can be used "
                        f"either; {CURE}"
                    )
                yield reason, None, number, f
        if faults and not usable:
            raise DataError(f"{first}, and no other row can be used either; {CURE}")
        if faults:
            of = f"{faults:,} of {faults + usable:,} rows"
            self.notes.append(f"source {self._config.path}: {of} cannot be used; the first is {first}")

    def _check_some_exist(self) -> None:
        """A wrong image_root is found at the start instead of after an epoch of replaced samples."""
        usable = np.flatnonzero(self._captions.is_valid().to_numpy(zero_copy_only=False))
        rows = usable[np.linspace(0, len(usable) - 1, min(16, len(usable)), dtype=np.int64)]
        names = [self._images[int(r)].as_py() for r in rows]
        if not any(os.path.exists(self.root / name) for name in names):
            raise DataError(
                f"source {self._config.path}: none of its images is there; {self.key(int(rows[0]))} is looked for at "
                f"{str(self.root / names[0])[:300]}. Set image_root to the folder that the paths in the file start from"
            )

    def __len__(self) -> int:
        return len(self._images)

    def key(self, row: int) -> str:
        return f"{self.files[self._file_of[row]].name}:{self._numbers[row]}"

    def __getitem__(self, row: int) -> Record:
        image, captions = self._images[row].as_py(), self._captions[row].as_py()
        if captions is None:
            raise BadSample(image)
        return Record(self.key(row), contained(image, self.root, self.linked), captions)

    def identity(self) -> str:
        return _identity(self.files, len(self), self._config)


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
    return json.dumps([columns, [(f.name, f.stat().st_size) for f in files]])


# datasets: parquet, saved data sets, the hub --------------------------------------------------------------------------


class Hosted:
    """A `datasets.Dataset`: memory-mapped Arrow that workers open by name."""

    def __init__(self, config: SourceConfig, data: datasets.Dataset, root: Path | None, files: Sequence[Path] = ()):
        self.weight, self.kind = config.weight, config.kind
        self._config, self._root, self._files = config, root, list(files)
        check_columns(data.features.arrow_schema, f"source {config.path}", config.image_column, config.caption_column)
        if not len(data):
            raise DataError(f"source {config.path}: no rows")
        rows = [parquet_file(f).metadata.num_rows for f in self._files]
        self._ends = np.cumsum(rows)
        self._roots = [root_of(config, file.parent) for file in self._files]
        data = data.select_columns([config.image_column, config.caption_column])
        if isinstance(data.features[config.image_column], datasets.Image):
            data = data.cast_column(config.image_column, datasets.Image(decode=False))
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
        return record(self.key(row), values[self._config.image_column], values[self._config.caption_column], root)

    def identity(self) -> str:
        features = str(self._data.features)
        return json.dumps([_identity(self._files, len(self), self._config), features, self._config.path])


def record(key: str, image: Any, captions: Any, root: Path | None) -> Record:
    """A Record of column values: image bytes, a path, or {bytes, path}; a caption or a list. Raises BadSample."""
    image, texts = image_of(image), captions_of(captions)
    return Record(key, _contained_in_any(image, root) if isinstance(image, str) else image, texts)


def _contained_in_any(name: str, root: Path | None) -> Path:
    """Under the root, or in the cache that `datasets` and the hub fill themselves."""
    if in_cache(name):
        return Path(os.path.realpath(name))
    if root is None:
        needs = f"image {shown(name)} is a path: set image_root to the folder that paths may start from"
        raise BadSample(check_name(name, "/") or needs)
    return contained(name, root)


def _open_parquet(config: SourceConfig, files: Sequence[Path]) -> Hosted:
    root = root_of(config, files[0].parent)
    return Hosted(config, load_parquet(files, config.image_column, config.caption_column), root, files)


def _open_dataset(config: SourceConfig) -> Hosted:
    path = check_spec(config.path)
    root = root_of(config, Path(path)) if config.image_root or os.path.isdir(path) else None
    return Hosted(config, open_dataset(path, config.split), root)


# Tar shards -----------------------------------------------------------------------------------------------------------


class Tars:
    """Samples of tar shards by number; headers are read at the start, members when they are asked for."""

    def __init__(self, config: SourceConfig, files: Sequence[Path]):
        self.weight, self.kind = config.weight, config.kind
        self.files, self._config = list(files), config
        names, spans, is_json, of, summaries = [], [], [], [], []
        for f, file in enumerate(files):
            shard = Shard(file, config.caption_column, allow_truncated=config.allow_truncated)
            names.append(pa.array(shard.names, pa.large_string()))
            spans.append(shard.spans())
            is_json.append(shard.is_json())
            of.append(np.full(len(shard), f, np.int32))
            summaries.append(shard.summary)
        self._names, self._spans = pa.concat_arrays(names), np.concatenate(spans)
        self._is_json, self._file_of = np.concatenate(is_json), np.concatenate(of)
        check_whole(f"source {config.path}", summaries)
        tell(summaries)

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


def tell(shards: Sequence[Summary]) -> None:
    """Log what a user should know of some shards, the first few by name; in the main process only."""
    lines = [f"{shard.path}: {note}" for shard in shards for note in shard.notes]
    if lines and dist.is_main():
        more = f" (and {len(lines) - _TOLD} more such notes)" * (len(lines) > _TOLD)
        logger.warning("%s%s", "\n".join(lines[:_TOLD]), more)


def tar_record(shard: Path, key: str, image: Member, caption: tuple[Member, bool], column: str) -> Record:
    """Read one sample of a shard. Raises BadSample when a part is missing."""
    if image.size < 0 or caption[0].size < 0:
        raise BadSample(f"no {'image' if image.size < 0 else 'caption'} member")
    if max(image.size, caption[0].size) > MAX_BYTES:
        raise BadSample(f"a member of more than {MAX_BYTES:,} bytes")
    text: Any = read_member(shard, caption[0]).decode("utf-8", "replace")
    if caption[1]:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"its .json member is not valid JSON: {error}") from None
        if isinstance(values, dict) and column not in values:
            have = ", ".join(sorted(values))[:200] or "nothing"
            raise BadSample(f"no caption: its .json member has no {column!r} (it has: {have})")
        text = values[column] if isinstance(values, dict) else values
    return record(key, read_member(shard, image), text, None)


# Opening --------------------------------------------------------------------------------------------------------------


def expand(path: str, endings: Sequence[str] = ("tar", "parquet", "jsonl")) -> list[Path]:
    """The files that a path, a glob, a range {000..012}, a list {a,b} or a::b, a file URL or a folder means.

    A folder means its files of such endings, sorted; a name that exists as it is written is no pattern.
    """
    found = [Path(file) for name in alternatives(path) for file in present(check_spec(name), "source")]
    files = [file for one in found for file in _in(one, endings)]
    twice = next((file for file, times in Counter(files).items() if times > 1), None)
    if twice is not None:
        raise DataError(f"source {path} means {twice} more than once")
    return files


def _in(path: Path, endings: Sequence[str]) -> list[Path]:
    """A file, or the files of a folder. Raises DataError for a folder without any."""
    files = [f for ending in endings for f in sorted(path.glob(f"*.{ending}"))] if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"source {path}: a folder without .tar, .parquet or .jsonl shards, metadata.jsonl or metadata.csv"
        )
    return files


def shard_files(path: str, kind: str) -> list[Path]:
    """`expand`, where a folder means its files of one format."""
    return expand(path, ("jsonl",) if kind == "json" else (kind,))


def format_of(config: SourceConfig) -> str:
    """The format that `auto` means for this path. Raises DataError when it cannot tell."""
    if config.format != "auto":
        return config.format
    path = Path(check_spec(config.path))
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return "dataset"
        if _metadata(path):
            return "imagefolder"
    files = expand(config.path) if path.exists() or path.suffix or is_pattern(config.path) else []
    formats = {_ENDINGS.get(f.suffix) for f in files}
    if len(formats) != 1 or None in formats:
        raise DataError(
            f"source {config.path}: cannot tell its format ({_what(path, files)}); expected .json, .jsonl, .csv, .tsv, "
            ".parquet or .tar files, a folder with metadata.jsonl, or set format (dataset for a name on the hub)"
        )
    return formats.pop()


def _what(path: Path, files: Sequence[Path]) -> str:
    if files:
        return "files ending in " + ", ".join(sorted({f.suffix or "nothing" for f in files}))
    return "a folder" if path.is_dir() else "no such file"


def open_source(config: SourceConfig) -> Source:
    """Open a source for access by number. Raises DataError that says what is missing and what to set."""
    kind = format_of(config)
    if kind == "dataset":
        return _open_dataset(config)
    if kind == "imagefolder":
        return _open_imagefolder(config)
    if kind != "json":
        refuse_split(config.split, f"source {config.path}", f"{kind} files")
    files = shard_files(config.path, kind)
    if kind == "parquet":
        return _open_parquet(config, files)
    if kind == "tar":
        return Tars(config, files)
    return Table(config, files, root_of(config, together(files)), (config.image_column, config.caption_column))


def open_sources(configs: Sequence[SourceConfig]) -> list[Source]:
    """Open all sources of a run. Raises DataError when there is none."""
    if not configs:
        raise DataError("no data: give at least one source")
    return [open_source(c) for c in configs]


def _metadata(folder: Path) -> list[Path]:
    """The metadata files of an imagefolder, of it or of the folders in it."""
    names = ("metadata.jsonl", "metadata.csv")
    return [f for name in names for f in (*folder.glob(name), *sorted(folder.glob(f"*/{name}")))]


def _open_imagefolder(config: SourceConfig) -> Table:
    folder = Path(check_spec(config.path))
    folder = folder / config.split if config.split and (folder / config.split).is_dir() else folder
    files = _metadata(folder)
    if not files:
        raise DataError(f"source {config.path}: no metadata.jsonl or metadata.csv with file_name and a caption column")
    there = columns_of(files[0])
    image = config.image_column if config.image_column in there else "file_name"
    caption = "text" if config.caption_column not in there and "text" in there else config.caption_column
    table = Table(_without_split(config, folder), files, root_of(config, folder), (image, caption))
    if config.image_root is None:  # metadata was found by listing the folder, which follows links
        table.linked = sorted({os.path.realpath(file.parent) for file in files} - {os.path.realpath(folder)})
    return table


def _without_split(config: SourceConfig, folder: Path) -> SourceConfig:
    """A split that is a folder is not looked for in the rows as well."""
    return dataclasses.replace(config, split=None) if folder != Path(check_spec(config.path)) else config


def digest(sources: Sequence[Source], *settings: object) -> str:
    """A hash of what sources hold and of settings that change what is made of it."""
    h = hashlib.sha256()
    for part in (*(s.identity() for s in sources), *map(str, settings)):
        h.update(part.encode() + b"\0")
    return h.hexdigest()[:32]
