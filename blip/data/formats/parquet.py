"""Parquet files and Arrow tables of images and captions: opening, checking columns by their types, reading rows.

Imports nothing heavy.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip.data.formats.remote import RemoteFile
from blip.data.formats.rows import Columns, StoredRow, choose_columns, row_of
from blip.errors import BadSample, DataError

_MEDIA = {"Audio", "Video", "Pdf", "Nifti", "ClassLabel"}
"""Features of `datasets` that are stored like images or captions, or as numbers, and are neither."""
_LONGEST_TYPE = 80
_TOGETHER = 64
"""Rows that are Python objects at once."""


def parquet_file(path: str | Path | RemoteFile, file: IO[bytes] | None = None) -> pq.ParquetFile:
    """Open a parquet file, or what is open already and has that name. Raises DataError that names it."""
    try:
        if isinstance(path, RemoteFile):
            return pq.ParquetFile(path.open("rb", 0), metadata=_footer(path))
        return pq.ParquetFile(path if file is None else file)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not readable parquet: {str(error).splitlines()[0]}") from None


def _footer(file: RemoteFile) -> pq.FileMetaData:
    """The footer of a remote file, kept since it was first read."""

    def read() -> bytes:
        kept = io.BytesIO()
        with file.open("rb", 0) as opened:
            pq.ParquetFile(opened).metadata.write_metadata_file(kept)
        return kept.getvalue()

    return file.cached("footer.parquet", read, lambda content: pq.read_metadata(io.BytesIO(content)))


# Columns --------------------------------------------------------------------------------------------------------------


def check_columns(schema: pa.Schema, where: str | Path, image: str, caption: str | None) -> None:
    """Raise DataError unless a table has one column of images and one of captions (None: is not asked for one).

    Images are bytes, paths, or {bytes, path}; captions are strings or lists of strings. The error names the file, the
    column, its type, what was expected, and which columns would do.
    """
    _check_column(schema, where, image, "image_column", "image bytes, a path, or {bytes, path}", _holds_images, caption)
    if caption is not None:
        _check_column(schema, where, caption, "caption_column", "a string or a list of strings", _holds_captions, image)


def _check_column(
    schema: pa.Schema, where: Any, column: str, option: str, expected: str, fits: Callable, taken: str | None
) -> None:
    times = schema.names.count(column)
    if not times:
        have = ", ".join(schema.names)[:200] or "nothing"
        raise DataError(f"{where} has no column {column!r} (it has: {have}); set {option}")
    if times > 1:
        raise DataError(f"{where} has {times} columns {column!r}: rename all but one")
    if _may_hold(schema, column, fits):
        return
    stored, feature = " ".join(str(schema.field(column).type).split()), _feature(schema, column)
    stored = stored if len(stored) <= _LONGEST_TYPE else f"{stored[:_LONGEST_TYPE]}..."
    stored = f"{feature} ({stored})" if feature in _MEDIA else stored
    others = [name for name in schema.names if name not in (column, taken) and schema.names.count(name) == 1]
    others = [name for name in others if _may_hold(schema, name, fits)]
    cure = f"; set {option} to another column ({', '.join(others)[:200]})" if others else ""
    raise DataError(f"{where}: column {column!r} holds {stored}; expected {expected} in each row{cure}")


def _may_hold(schema: pa.Schema, column: str, fits: Callable) -> bool:
    return _feature(schema, column) not in _MEDIA and fits(schema.field(column).type)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values, however they are packed."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def _is_text(kind: pa.DataType) -> bool:
    """Whether values are strings, or all null, which is a fault of the rows."""
    kind, t = _plain_type(kind), pa.types
    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind) or t.is_null(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    kind, t = _plain_type(kind), pa.types
    views = t.is_binary_view(kind) or t.is_fixed_size_binary(kind)
    return t.is_binary(kind) or t.is_large_binary(kind) or views or t.is_null(kind)


def _holds_images(kind: pa.DataType) -> bool:
    kind = _plain_type(kind)
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        known = {"bytes": _is_bytes, "path": _is_text}
        return bool(fields.keys() & known.keys()) and all(
            fits(fields[name]) for name, fits in known.items() if name in fields
        )
    return _is_bytes(kind) or _is_text(kind)


def _holds_captions(kind: pa.DataType) -> bool:
    kind = _plain_type(kind)
    return _is_text(kind.value_type if _has_items(kind) else kind)


def _has_items(kind: pa.DataType) -> bool:
    t = pa.types
    lists = t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)
    return lists or t.is_list_view(kind) or t.is_large_list_view(kind)


def _feature(schema: pa.Schema, column: str) -> str | None:
    """Feature type that `datasets` noted for a column when it wrote the file, such as Image or ClassLabel."""
    try:
        kind = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["_type"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None


def common_schema(schemas: Sequence[pa.Schema], files: Sequence[Path], image: str, caption: str) -> pa.Schema:
    """The two columns as all of some files can be read: the types of the first file, unpacked, nulls filled in.

    Raises DataError that names two files with columns of different kinds, such as bytes and paths.
    """
    fields = []
    for column in (image, caption):
        common, of = pa.null(), files[0]
        for file, schema in zip(files, schemas, strict=True):
            kind = _unpacked(schema.field(column).type)
            if pa.types.is_null(common):
                common, of = kind, file
            elif not pa.types.is_null(kind) and _shape(kind) != _shape(common):
                cure = "give them as two sources"
                raise DataError(f"{file}: column {column!r} holds {kind}, but {common} in {of}: {cure}")
            common = _filled(common, kind)
        fields.append(pa.field(column, common))
    return pa.schema(fields, schemas[0].metadata)


def _shape(kind: pa.DataType) -> str:
    if pa.types.is_struct(kind):
        return "struct"
    return "bytes" if _is_bytes(kind) else "text" if _is_text(kind) else "list"


def _filled(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    """An unpacked type with that of another file wherever it is null, as a column is that has no value in a file."""
    if pa.types.is_null(kind):
        return other
    if pa.types.is_struct(kind) and pa.types.is_struct(other):
        types = {other.field(i).name: other.field(i).type for i in range(other.num_fields)}
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([(f.name, _filled(f.type, types.get(f.name, pa.null()))) for f in fields])
    if _has_items(kind) and _has_items(other) and pa.types.is_null(kind.value_type):
        return other
    return kind


def _unpacked(kind: pa.DataType) -> pa.DataType:
    """A type of images or captions without what `datasets` does not know: dictionaries, views, fixed sizes."""
    kind, t = _plain_type(kind), pa.types
    if t.is_struct(kind):
        return pa.struct([(kind.field(i).name, _unpacked(kind.field(i).type)) for i in range(kind.num_fields)])
    if t.is_string_view(kind):
        return pa.large_string()
    if t.is_binary_view(kind) or t.is_fixed_size_binary(kind):
        return pa.large_binary()
    if not _has_items(kind):
        return kind
    items = _unpacked(kind.value_type)
    if t.is_list(kind):
        return kind if items == kind.value_type else pa.list_(items)
    return kind if t.is_large_list(kind) and items == kind.value_type else pa.large_list(items)


# Rows -----------------------------------------------------------------------------------------------------------------


def values_of(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows of a table as dictionaries, converted together; call it with few rows at once.

    A value that Python cannot hold (text that is not UTF-8, a date after the year 9999) is a BadSample in its place, so
    that it costs its own row nothing but itself, and other rows nothing.
    """
    try:
        rows = table.to_pylist()
    except Exception:  # each type raises errors of its own: UnicodeDecodeError, OverflowError, ArrowInvalid, ...
        names = list(enumerate(table.schema.names))
        rows = [{name: _value(table, at, row) for at, name in names} for row in range(len(table))]
    yield from rows


def _value(table: pa.Table | pa.RecordBatch, column: int, row: int) -> Any:
    try:
        return table.column(column)[row].as_py()
    except UnicodeDecodeError as error:
        return BadSample(f"column {table.schema.names[column]!r} is not UTF-8 text: {error.reason}")
    except MemoryError:  # the machine's fault, not the row's
        raise
    except Exception as error:
        return BadSample(f"column {table.schema.names[column]!r} cannot be read: {type(error).__name__}: {error}")


class RowGroups:
    """A parquet file with random access to rows, without reading all of it; the last row group is cached."""

    def __init__(self, file: IO[bytes] | str | pq.ParquetFile, columns: Sequence[str] | None = None) -> None:
        """Of a file, its rows' values in some columns; in all if not given."""
        self.file = file if isinstance(file, pq.ParquetFile) else pq.ParquetFile(file)
        self._columns = None if columns is None else list(columns)
        groups = range(self.file.metadata.num_row_groups)
        self._ends = list(itertools.accumulate(self.file.metadata.row_group(g).num_rows for g in groups))
        self._kept: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def values(self, lo: int, hi: int) -> Iterator[dict[str, Any]]:
        """Rows lo to hi (exclusive) by `values_of`."""
        start = 0
        for g, end in enumerate(self._ends):
            if lo < end and hi > start:
                table = self._group(g).slice(max(lo - start, 0), min(hi, end) - max(lo, start))
                for at in range(0, len(table), _TOGETHER):
                    yield from values_of(table.slice(at, _TOGETHER))
            start = end

    def _group(self, g: int) -> pa.Table:
        if self._kept is None or self._kept[0] != g:
            self._kept = g, self.file.read_row_group(g, self._columns, use_threads=False)
        return self._kept[1]


def chosen_columns(schema: pa.Schema, requested: Columns, where: str | Path) -> Columns:
    """The columns of image and caption, each there once and of a type that holds them. DataError if not."""
    columns = choose_columns(schema.names, requested, where)
    check_columns(schema, where, *columns)
    return columns


class Parquet:
    """The rows of one parquet file, all its columns."""

    def __init__(self, groups: RowGroups, columns: Columns):
        self.groups, self.columns = groups, columns

    def __len__(self) -> int:
        return len(self.groups)

    def rows(self, lo: int, hi: int) -> Iterator[StoredRow]:
        for number, values in zip(range(lo, hi), self.groups.values(lo, hi), strict=True):
            yield row_of(number, values, self.columns)


def rows_of(file: pq.ParquetFile, where: str | Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All rows of an open file by `values_of`. Raises DataError that names a damaged file."""
    try:
        for batch in file.iter_batches(batch_size=_TOGETHER, columns=list(columns)):
            yield from values_of(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is damaged: {str(error).splitlines()[0]}") from None
