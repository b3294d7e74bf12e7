"""Open data sets with the `datasets` library: parquet through its cache, folders of save_to_disk, names on the hub.

`datasets`, which is slow to import, is imported when one is opened.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip.data.formats.parquet import check_columns, common_schema, parquet_file, values_of
from blip.data.formats.rows import Columns, StoredRow, row_of
from blip.data.formats.splits import parts_of, refuse_split
from blip.data.paths import check_name, under
from blip.errors import DataError

if TYPE_CHECKING:
    import datasets

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOLCK}
"""Error numbers that only writing can meet."""


def load_parquet(files: Sequence[Path], image: str, caption: str) -> datasets.Dataset:
    """The image and caption columns of parquet files. Raises DataError that names the file, the column or the cache."""
    import datasets

    schemas = []
    for file in files:
        schemas.append(parquet_file(file).schema_arrow)
        check_columns(schemas[-1], file, image, caption)
        if "::" in str(file):
            raise DataError(f"{file}: rename it; `datasets` takes :: for a chain of addresses")
    features = datasets.Features.from_arrow_schema(common_schema(schemas, files, image, caption))
    try:
        return datasets.load_dataset(
            "parquet",
            data_files=[glob.escape(str(f)) for f in files],  # which would be taken for patterns
            split="train",
            columns=[image, caption],
            features=features,
        )
    except Exception as error:  # datasets wraps pyarrow's errors in several types of its own
        named = f"{files[0]}" + f" and {len(files) - 1} more" * (len(files) > 1)
        raise DataError(f"{named}: {_cache_trouble(error) or f'not readable parquet: {_first_cause(error)}'}") from None


def open_dataset(path: str, split: str | None, revision: str | None = None) -> datasets.Dataset:
    """A folder written by save_to_disk, or the data set of that name on the hub, and of it one split (or `a+b`).

    Raises DataError that says what it is instead, which splits there are , or that the cache cannot
    be written.
    """
    import datasets

    try:
        if os.path.isdir(path):
            data = datasets.load_from_disk(path)
        else:
            data = datasets.load_dataset(path, split=split, revision=revision)
    except Exception as error:  # datasets raises what its readers raise
        what = "cannot open as a dataset, neither as a folder written by save_to_disk nor from the hub"
        raise DataError(f"{path}: {_cache_trouble(error) or f'{what}: {_first_cause(error)}'}") from None
    if isinstance(data, dict):
        wanted = parts_of(split) if split else []
        if not wanted or any(name not in data for name in wanted):
            raise DataError(f"{path}: set split to one of {', '.join(data)}, got {split!r}")
        chosen = [data[name] for name in wanted]
        return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
    if os.path.isdir(path):
        refuse_split(split, path, "data sets that were saved by themselves")
    return data


def rows_at(data: datasets.Dataset, lo: int, hi: int) -> Iterator[dict[str, Any]]:
    """Rows lo to hi (exclusive) as they are stored, nothing decoded, by `values_of`."""
    stored = data.with_format("arrow")
    for at in range(lo, hi, 64):
        yield from values_of(stored[at : min(at + 64, hi)])


class Hosted:
    """The rows of a data set, all its columns."""

    def __init__(self, data: datasets.Dataset, columns: Columns):
        self.data, self.columns = data, columns

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, lo: int, hi: int) -> Iterator[StoredRow]:
        for number, values in zip(range(lo, hi), rows_at(self.data, lo, hi), strict=True):
            yield row_of(number, values, self.columns)


def in_cache(name: str) -> bool:
    """Whether a name in data is an absolute path, links followed, into the cache that the hub fills itself."""
    if not os.path.isabs(name) or check_name(name, "/"):
        return False
    return under(os.path.realpath(name), _cache())


@functools.cache
def _cache() -> str:
    """The folder that the hub fills itself, links followed."""
    import datasets

    return os.path.realpath(datasets.config.HF_CACHE_HOME)


def _cache_trouble(error: BaseException | None) -> str | None:
    """Message for an error caused by an unwritable cache; None for other errors."""
    import datasets

    cache = str(datasets.config.HF_DATASETS_CACHE)
    folders = [os.path.abspath(folder) for folder in (cache, datasets.config.HF_CACHE_HOME)]
    while error is not None:
        if isinstance(error, OSError):
            name = os.path.abspath(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
            ours = name is not None and any(under(name, f) or under(f, name) for f in folders)
            if ours or error.errno in _UNWRITABLE:
                reason = error.strerror or type(error).__name__
                return (
                    f"the cache of `datasets`, {cache}, cannot be written ({reason}): set HF_DATASETS_CACHE to a "
                    "folder that can be, or HF_HOME, which moves all caches of Hugging Face"
                )
        error = error.__cause__ or error.__context__
    return None


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
