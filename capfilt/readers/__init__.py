"""Readers: rows of encoded images and texts by number, from the formats that crawls come in. They never decode."""

from __future__ import annotations

from capfilt.readers.rows import Reader, Source
from capfilt.settings import ReadConfig
from capfilt.store.storage import Storage


def open_reader(source: Source, config: ReadConfig, storage: Storage) -> Reader:
    """The reader of a planned source; `storage` is the run, where the indexes are."""
    if source.kind == "tar":
        from capfilt.readers.tar import TarReader

        return TarReader(source, config, storage)
    if source.kind == "listed":
        from capfilt.readers.listed import ListedReader

        return ListedReader(source, config, storage)
    if source.kind == "parquet":
        from capfilt.readers.parquet import ParquetReader

        return ParquetReader(source, config)
    from capfilt.readers.hosted import HostedReader

    return HostedReader(source, config)
