"""What readers give: rows, and the files they come from with what tells these from other files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from blip.data.formats.parquet import values_of
from blip.data.formats.values import captions_of, encodable
from blip.data.images import MAX_BYTES
from blip.data.paths import contained
from blip.errors import BadSample, DataError, shown
from capfilt.settings import NO_COLUMN, ReadConfig

REMOTE = ("s3://", "gs://", "gcs://", "az://", "abfs://", "abfss://", "hf://", "memory://")
_HEAD, _SPOTS, _SPOT = 1 << 16, 16, 1 << 12


@dataclass
class Row:
    """One row of the input as it is stored."""

    number: int
    key: str
    image: bytes | None = None
    """Encoded; None when there is none, and then `problem` says why."""
    texts: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """The row's other columns."""
    problem: tuple[str, str, str] | None = None
    """(status, error code, detail) of a row without a readable image."""


@dataclass(frozen=True)
class Source:
    """One input file (or data set) as it was when the plan was made."""

    kind: str
    """tar, listed, parquet or hosted."""
    path: str
    relpath: str
    """Path under the input root; part of every sample id."""
    size: int
    mtime: float
    content: str
    """Hash of a sample of the bytes, or the store's tag."""
    rows: int
    index: str | None = None
    """Name of the index of rows in the run's folder."""
    damage: str | None = None
    """What is wrong with the file, where only a part of it can be read."""
    declared: int | None = None
    """Rows that the crawl's own statistics promise."""
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """Rows of one source by number."""

    def read(self, lo: int, hi: int) -> Iterator[Row]:
        """Rows lo to hi (exclusive), in order. Raises OSError when the file cannot be read."""


def is_remote(path: str) -> bool:
    return path.startswith(REMOTE)


def open_file(path: str) -> IO[bytes]:
    """A readable, seekable file of this machine or of an object store."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`. OSError if there are fewer."""
    if is_remote(path):
        import fsspec

        files, inside = fsspec.core.url_to_fs(path)
        content = files.cat_file(inside, start=start, end=start + size)
    else:
        handle = os.open(path, os.O_RDONLY)
        try:
            content = os.pread(handle, size, start)
        finally:
            os.close(handle)
    if len(content) != size:
        raise OSError(f"{path} ends before byte {start + size:,}: it was cut off")
    return content


def stat_of(path: str) -> tuple[int, float, str | None]:
    """(bytes, seconds of the last change, the store's tag or None). FileNotFoundError if it is gone."""
    if not is_remote(path):
        info = os.stat(path)
        return info.st_size, info.st_mtime, None
    import fsspec

    files, inside = fsspec.core.url_to_fs(path)
    files.invalidate_cache()
    info = files.info(inside)
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("checksum")
    return int(info["size"]), 0.0, str(tag) if tag else None


def content_of(path: str) -> str:
    """A hash of a file's size, beginning, end and 16 places between: quick for any size."""
    size, _, tag = stat_of(path)
    h = hashlib.sha256(f"{size} {tag or ''}".encode())
    if tag is None:
        with open_file(path) as file:
            h.update(file.read(_HEAD))
            for i in range(1, _SPOTS + 1):
                file.seek(max(0, (size - _SPOT) * i // _SPOTS))
                h.update(file.read(_SPOT))
    return h.hexdigest()[:16]


def changed(source: Source) -> str | None:
    """How a source differs from what was planned; None if it does not. A file that was only copied does not."""
    if source.kind == "hosted":
        from capfilt.readers.hosted import hosted_content

        now = hosted_content(source.path)
        return None if now in (None, source.content) else "the data set has other content now"
    try:
        size, mtime, _ = stat_of(source.path)
    except FileNotFoundError:
        return "the file is gone"
    if size != source.size:
        return f"the file had {source.size:,} bytes and has {size:,} now"
    if (is_remote(source.path) or mtime != source.mtime) and content_of(source.path) != source.content:
        return "the file's content is another now"
    return None


def read_image(name: str, root: str) -> tuple[bytes | None, tuple[str, str, str] | None]:
    """The bytes of an image file that data names, or the problem with it."""
    try:
        path = contained(name, os.path.abspath(root))
    except BadSample as error:
        return None, ("no_image", "path_refused", error.reason)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a named pipe must not block
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                return None, ("no_image", "unreadable", f"{shown(name)} is not a regular file")
            if info.st_size > MAX_BYTES:
                return None, ("too_large", "too_many_bytes", f"{info.st_size:,} bytes")
            return file.read(), None
    except (FileNotFoundError, NotADirectoryError):
        return None, ("no_image", "missing_file", f"no such file: {shown(name)}")
    except OSError as error:
        return None, ("source_error", "unreadable", f"{shown(name)} cannot be read: {error.strerror}")


plain = encodable
"""Text without the half characters that JSON may hold and nothing can store."""


def texts_of(value: Any) -> list[str]:
    """The texts of a column's value: a string or the strings of a list; none of anything else."""
    try:
        return captions_of(value)
    except BadSample:
        return []


def extra_of(row: dict[str, Any], *taken: str) -> dict[str, Any]:
    """The other columns of a row, as far as JSON can hold them: no bytes, and null for a number that is none."""
    found = {}
    for name, value in row.items():
        if name not in taken and not isinstance(value, bytes | BadSample):
            with contextlib.suppress(TypeError, ValueError, RecursionError):
                found[name] = json.loads(json.dumps(value, default=_as_text), parse_constant=lambda _: None)
    return found


def _as_text(value: Any) -> str | None:
    return None if isinstance(value, bytes) else str(value)


class RowGroups:
    """A parquet file from which any rows can be had without reading all of it; the last group is kept."""

    def __init__(self, file: IO[bytes] | io.BytesIO | str, columns: list[str] | None = None) -> None:
        self.file, self.columns = pq.ParquetFile(file), columns
        meta = self.file.metadata
        self._ends = []
        for g in range(meta.num_row_groups):
            self._ends.append((self._ends[-1] if self._ends else 0) + meta.row_group(g).num_rows)
        self._kept: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, lo: int, hi: int) -> Iterator[dict[str, Any]]:
        """Rows lo to hi as dictionaries, by `values_of`."""
        start = 0
        for g, end in enumerate(self._ends):
            if lo < end and hi > start:
                table = self._group(g).slice(max(lo - start, 0), min(hi, end) - max(lo, start))
                for at in range(0, len(table), 64):  # so that only some rows are Python objects at once
                    yield from values_of(table.slice(at, 64))
            start = end

    def _group(self, g: int) -> pa.Table:
        if self._kept is None or self._kept[0] != g:
            self._kept = g, self.file.read_row_group(g, columns=self.columns, use_threads=False)
        return self._kept[1]


def choose_column(
    columns: Sequence[str], config: ReadConfig, which: str, known: Sequence[str], where: str
) -> str | None:
    """The column that `image_column` or `caption_column` asks for; None for captions of no column, `none`.

    Where none was asked for, one that the format is `known` to use instead will do. DataError lists those there are.
    """
    wanted = getattr(config, which)
    if (which, wanted) == ("caption_column", NO_COLUMN):
        return None
    for name in (wanted, *(known if wanted == getattr(ReadConfig, which) else ())):
        if name in columns:
            return name
    have = ", ".join(sorted(map(str, columns)))[:200] or "nothing"
    option = {"image_column": "--image-column", "caption_column": "--caption-column (or none)"}[which]
    raise DataError(f"{where} has no column {wanted!r} (it has: {have}); set {option}")
