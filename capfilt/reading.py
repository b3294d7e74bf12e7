"""From input to rows: the files of an input, the plan of each, and its rows by number. Nothing is decoded.

The formats are those of training (`blip.data.formats`). Lists, folders and tars have no access by row number, so the
plan keeps an index of them as parquet, which has; images and members stay in place.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip.data import images
from blip.data.formats import rows, table, tars
from blip.data.formats.finding import SourceFile, file_format, find_one
from blip.data.formats.folder import Downloaded, ImagesWithSidecars
from blip.data.formats.parquet import Parquet, RowGroups, chosen_columns, parquet_file
from blip.data.formats.rows import NO_COLUMN, Columns, Format, columns_of
from blip.data.formats.splits import refuse_split
from blip.data.formats.values import encodable
from blip.data.images import model_input, small
from blip.data.paths import alternatives, contained, is_plain_path
from blip.errors import BadSample, DataError, UnreadableImage, shown
from capfilt import schema
from capfilt.settings import ReadConfig
from capfilt.sources import HUB, PlannedSource, content_of, dataset_content, is_remote, open_file, read_range, stat_of
from capfilt.store import parts as part_files
from capfilt.store.storage import Local, Storage

_GROUP = 1024
"""Rows of an index that are read together."""
_BLOCK = 1 << 16
_REQUEST, _APART = 1 << 23, 1 << 16
"""Most bytes of a request for several members of a remote shard, and between two of them."""
_SPAN = pa.struct([("at", pa.int64()), ("size", pa.int64())])
MEMBERS = pa.schema([("key", pa.string()), *((slot, _SPAN) for slot in tars.SLOTS)])
"""The index of a tar: where the members of each sample are."""
ENTRIES = pa.schema(
    [("key", pa.string()), ("image", pa.string()), ("texts", pa.list_(pa.string())), ("extra", pa.string()),
     ("fault", pa.string())]
)  # fmt: skip
"""The index of a list; `fault` is why a row has no image; None in the indexes of older plans."""


@dataclass
class InputRow:
    """A stored row of the input."""

    number: int
    key: str
    image: bytes | None = None
    """Encoded image; None where there is none, and then `problem` says why."""
    texts: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """Other columns of the row."""
    problem: tuple[str, str, str] | None = None
    """(status, error code, detail) of a row without a readable image."""


# Finding files --------------------------------------------------------------------------------------------------------


def find(spec: str, split: str | None = None) -> list[SourceFile]:
    """List the files that an input names, in a fixed order. DataError for missing or unreadable ones.

    `split` chooses among the folders of an image folder that has one per split.
    """
    if spec.startswith(HUB):
        return [SourceFile("dataset", spec)]
    files = []
    for name in alternatives(spec):
        if is_remote(name):
            files += _remote(name)
        elif is_plain_path(name):
            files += find_one(os.path.abspath(name), "input", split=split)
        else:
            only = "only files of this machine or of an object store are read; download it first"
            raise DataError(f"input {name!r}: {only}")
    return [one._replace(path=str(one.path)) for one in files]


def _remote(spec: str) -> list[SourceFile]:
    import fsspec

    files, inside = fsspec.core.url_to_fs(spec)
    scheme = spec.split("://")[0]
    paths = sorted(files.glob(inside)) if "*" in inside else [inside] if files.exists(inside) else []
    if not paths:
        raise DataError(f"input {spec}: no such object")
    kinds = [SourceFile(file_format(Path(p), "input"), f"{scheme}://{p.lstrip('/')}") for p in paths]
    if any(one.format == "json" for one in kinds):
        raise DataError(f"input {spec}: only tar and parquet are read from an object store; copy lists here")
    return kinds


# Planning a file ------------------------------------------------------------------------------------------------------


def describe(
    input_file: SourceFile, relpath: str, config: ReadConfig, storage: Storage, seen: Counter[str] | None = None
) -> PlannedSource:
    """Describe a file for the plan, with its number of rows; writes its index of rows where the format needs one.

    `seen` counts the splits of the lists.
    """
    path, kind = input_file.path, input_file.format
    if kind == "dataset":
        return _dataset(path, relpath, config)
    if kind in ("parquet", "tar", "files"):
        refuse_split(config.split, path, f"{'parquet' if kind == 'files' else kind} sources")
    size, mtime, _ = stat_of(path)
    content, declared = content_of(path), _declared(path)
    if kind == "parquet":
        file = open_parquet(path)
        chosen_columns(file.schema_arrow, columns_of(config), path)
        return PlannedSource("parquet", path, relpath, size, mtime, content, file.metadata.num_rows, declared=declared)
    if kind == "tar":
        index, damage, notes = index_tar(path)
        check_column(path, index, config)
    elif kind == "files":
        index, damage, notes = _index_files(path, config)
    elif os.path.isdir(path):
        refuse_split(None if input_file.of_split else config.split, path, "folders of images with side-cars")
        captioned = ImagesWithSidecars(Path(path))
        index, damage, notes = _index(captioned.rows(columns_of(config))), None, captioned.notes
    else:
        index, damage, notes = _index_list(path, config, None if input_file.of_split else config.split, seen)
    name = f"plan/index/{hashlib.sha256(relpath.encode()).hexdigest()[:16]}-{content}.parquet"
    storage.write(name, part_files.encode(index, {"source": relpath}, _GROUP))
    if declared is not None and declared > len(index):
        damage = f"{damage or 'samples are missing'} (readable {len(index)}, declared {declared} in stats.json)"
    kind = "tar" if kind == "tar" else "listed"
    return PlannedSource(kind, path, relpath, size, mtime, content, len(index), name, damage, declared, tuple(notes))


def _declared(path: str) -> int | None:
    """Return the number of samples that img2dataset recorded for a shard; None without a record."""
    stats = os.path.splitext(path)[0] + "_stats.json"
    if is_remote(path) or not os.path.isfile(stats):
        return None
    try:
        value = json.loads(Path(stats).read_bytes())["successes"]
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return value if isinstance(value, int) else None


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a parquet file. DataError names the file if it is not one."""
    return parquet_file(path, open_file(path) if is_remote(path) else None)


@functools.lru_cache(maxsize=4)
def open_dataset(path: str, split: str | None) -> Any:
    """Open a `datasets.Dataset`. DataError says what it is instead, or which splits there are."""
    from blip.data.formats import hosted

    name, _, revision = path.removeprefix(HUB).partition("@") if path.startswith(HUB) else (path, "", "")
    return hosted.open_dataset(name, split, revision or None)


def _dataset(path: str, relpath: str, config: ReadConfig) -> PlannedSource:
    data = open_dataset(path, config.split)
    chosen_columns(data.features.arrow_schema, columns_of(config), path)
    size = sum(os.path.getsize(f["filename"]) for f in data.cache_files)
    content = dataset_content(path) or hashlib.sha256(data._fingerprint.encode()).hexdigest()[:16]
    return PlannedSource("hosted", path, relpath, size, 0.0, content, len(data))


def index_tar(path: str) -> tuple[pa.Table, str | None, list[str]]:
    """Read all headers of a shard -> (samples, damage or None, notes).

    A truncated shard is indexed up to the damage. DataError for a shard that cannot be used at all.
    """
    with open_file(path) as file:
        shard = tars.read_headers(file, path)
    samples = [{"key": s.key} | {slot: _span(getattr(s, slot)) for slot in tars.SLOTS} for s in shard.samples]
    damage = shard.damage
    if damage and samples:
        damage = f"{damage}; readable are {len(samples)} samples"
    return pa.Table.from_pylist(samples, MEMBERS), damage, shard.notes


def _span(member: tars.Member) -> dict[str, int] | None:
    return {"at": member.offset, "size": member.size} if member.size >= 0 else None


def check_column(path: str, index: pa.Table, config: ReadConfig) -> None:
    """Raise DataError if none of the first samples of an index has the caption column.

    Images without any columns or texts are accepted unless another caption column was named.
    """
    column, first = config.caption_column, index.slice(0, rows.FIRST_ROWS).to_pylist()
    if column == NO_COLUMN or (column == tars.TEXT_COLUMN and any(entry["text"] for entry in first)):
        return
    names: set[str] = set()
    for span in (entry["json"] for entry in first if entry["json"]):
        names |= tars.json_columns(read_range(path, span["at"], min(span["size"], images.MAX_BYTES))).keys()
        if column in names:
            return
    if names or (first and column != tars.TEXT_COLUMN):
        where = f"{path}: of the first {len(first)} samples, none"
        rows.choose(list(names), columns_of(config), "caption", where, known=False)


def _index_list(
    path: str, config: ReadConfig, split: str | None, seen: Counter[str] | None
) -> tuple[pa.Table, None, list[str]]:
    """Index the rows of a list, those of `split` if given; unusable rows count as rows, too."""
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text.removeprefix(f"{path}: "))

    return _index(table.rows(Path(path), columns_of(config), split, seen, note)), None, notes


def _index_files(path: str, config: ReadConfig) -> tuple[pa.Table, str | None, list[str]]:
    """Index a shard of img2dataset's `files` output, given its parquet beside the folder."""
    downloads = Downloaded(Path(path), columns_of(config))
    notes = [f"{downloads.failed} rows were never downloaded and are not part of the input"] if downloads.failed else []
    unread = [row.captions for row in downloads.rows() if _unreadable(row.captions)]
    if unread:
        notes.append(f"{len(unread)} texts are left out, the first as {unread[0]}")
    damage = f"{downloads.gone} images that its parquet names are gone" if downloads.gone else None
    return _index(downloads.rows()), damage, notes


def _index(stored: Iterable[rows.StoredRow]) -> pa.Table:
    """Return the rows of a list as a table, building Python objects for only some rows at once."""
    blocks, block = [], []
    for row in stored:
        fault = row.image if isinstance(row.image, BadSample) else None
        block.append(
            {
                "key": encodable(row.key),
                "image": None if fault else row.image,
                "texts": [] if isinstance(row.captions, BadSample) else row.captions,
                "extra": json.dumps(row.others()),
                "fault": fault and fault.reason,
            }
        )
        if len(block) == _BLOCK:
            blocks.append(pa.Table.from_pylist(block, ENTRIES))
            block = []
    return pa.concat_tables([*blocks, pa.Table.from_pylist(block, ENTRIES)])


# Rows by number -------------------------------------------------------------------------------------------------------


class Reader:
    """Rows of one source by number, with the bytes of their images."""

    def __init__(self, source: PlannedSource, config: ReadConfig, storage: Storage) -> None:
        """`storage` is the run, where the indexes are."""
        self.source = source
        self.opened = _open(source, config, storage)
        self.root = config.image_root or (source.path if os.path.isdir(source.path) else os.path.dirname(source.path))
        if source.kind == "hosted":
            self.root = config.image_root or ("" if source.path.startswith(HUB) else source.path)
        # img2dataset's folder was listed by us, so that it may be a link; what the images in it are may not lead out.
        listed = source.kind == "listed" and source.path.endswith(".parquet") and not config.image_root
        self.folder = source.path.removesuffix(".parquet") if listed else None

    def read(self, lo: int, hi: int) -> Iterator[InputRow]:
        """Read rows lo to hi (exclusive), in order. Raises OSError when the file cannot be read."""
        for row in self.opened.rows(lo, hi):
            yield self._with_image(row)

    def _with_image(self, row: rows.StoredRow) -> InputRow:
        texts = [] if isinstance(row.captions, BadSample) else row.captions
        extra = row.values if self.source.kind == "listed" else row.others()
        done = InputRow(row.number, row.key, texts=texts, extra=extra)
        try:
            if isinstance(row.image, BadSample):
                raise row.image
            if _unreadable(row.captions):
                raise row.captions
            done.image = self._bytes(row.image)
        except BadSample as error:
            done.problem = schema.problem(error)
        return done

    def _bytes(self, image: bytes | str) -> bytes:
        if isinstance(image, bytes):
            if len(image) > images.MAX_BYTES:
                raise UnreadableImage("too_many_bytes", f"{len(image):,} bytes")
            return image
        if self.folder:
            return read_image(os.path.basename(image), self.folder)
        root = self.root
        if self.source.kind == "hosted":  # files in the cache that the hub fills itself may be opened, too
            from blip.data.formats.hosted import CACHE, in_cache

            root = CACHE if in_cache(image) else root or CACHE
        return read_image(image, root)


def shown_image(reader: Reader, row: int, max_pixels: int, side: int) -> Image.Image | None:
    """Read the image of a row, at most `side` pixels per side; None if it cannot be read, or no longer."""
    try:
        stored = next(reader.read(row, row + 1))
        return model_input(stored.image or b"", max_pixels, lambda image: small(image, side), side)
    except Exception:  # whatever a file that was changed meanwhile makes its library raise
        return None


def _unreadable(value: Any) -> bool:
    """Tell whether a value is present but unreadable (not just absent)."""
    return isinstance(value, BadSample) and value.code == "unreadable"


def read_image(name: str, root: str) -> bytes:
    """Read an image file that the data names. Raises BadSample."""
    try:
        return images.read(contained(name, os.path.abspath(root)))
    except UnreadableImage as error:
        raise UnreadableImage(error.code, f"{error.reason}: {shown(name)}") from None


def _open(source: PlannedSource, config: ReadConfig, storage: Storage) -> Format:
    if source.kind == "tar":
        column = None if config.caption_column == NO_COLUMN else config.caption_column
        return tars.Tar(open_index(storage, source), column, functools.partial(_members, source.path))
    if source.kind == "listed":
        return Entries(open_index(storage, source))
    if source.kind == "parquet":
        columns = chosen_columns(open_parquet(source.path).schema_arrow, columns_of(config), source.path)
        return Parquet(RowGroups(open_file(source.path) if is_remote(source.path) else source.path), columns)
    from blip.data.formats.hosted import Hosted

    data = open_dataset(source.path, config.split)
    return Hosted(data, chosen_columns(data.features.arrow_schema, columns_of(config), source.path))


@contextlib.contextmanager
def _members(path: str, members: Sequence[tars.Member]) -> Iterator[tars.ReadMember]:
    """Read members of a shard, which stays open meanwhile. A failed read, or opening, is the BadSample of each row."""
    opened = None
    if is_remote(path):
        read_bytes = _together(path, members)
    else:
        with contextlib.suppress(OSError):
            opened = os.open(path, os.O_RDONLY)

        def read_bytes(member: tars.Member) -> bytes:
            return read_range(path, *member, opened)

    def read(member: tars.Member) -> bytes:
        try:
            return read_bytes(member)
        except OSError as error:
            raise BadSample(error.strerror or str(error), "unreadable") from None

    try:
        yield read
    finally:
        if opened is not None:
            os.close(opened)


def _together(path: str, members: Sequence[tars.Member]) -> tars.ReadMember:
    """Read members of a remote shard, neighbours in one request of up to `_REQUEST` bytes; the last one is kept."""
    starts: list[int] = []
    stops: list[int] = []
    for member in sorted(members):
        if stops and member.offset <= stops[-1] + _APART and sum(member) - starts[-1] <= _REQUEST:
            stops[-1] = max(stops[-1], sum(member))
        else:
            starts.append(member.offset)
            stops.append(sum(member))
    kept: tuple[int, bytes] = (-1, b"")

    def read(member: tars.Member) -> bytes:
        nonlocal kept
        at = bisect.bisect_right(starts, member.offset) - 1
        if kept[0] != at:
            kept = at, read_range(path, starts[at], stops[at] - starts[at])
        start = member.offset - starts[at]
        return kept[1][start : start + member.size]

    return read


def open_index(storage: Storage, source: PlannedSource) -> RowGroups:
    """Open the index of a source's rows."""
    assert source.index is not None
    if isinstance(storage, Local):
        return RowGroups(str(storage.path(source.index)))
    return RowGroups(io.BytesIO(storage.read(source.index)))


class Entries:
    """Rows of a list, by the index that the plan keeps."""

    def __init__(self, index: RowGroups) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, lo: int, hi: int) -> Iterator[rows.StoredRow]:
        for number, entry in zip(range(lo, hi), self.index.values(lo, hi), strict=True):
            image = entry["image"]
            if image is None:
                image = BadSample(entry.get("fault") or "no image path in the row", "no_image")
            yield rows.StoredRow(
                number, entry["key"], image, entry["texts"] or [], json.loads(entry["extra"]), Columns()
            )
