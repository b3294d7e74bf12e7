"""Opening a parquet file, with an error that names it. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from blip.data.errors import DataError


def parquet_file(path: str | Path, file: IO[bytes] | None = None) -> pq.ParquetFile:
    """Open a parquet file, or what is open already and has that name. Raises DataError that names it."""
    try:
        return pq.ParquetFile(path if file is None else file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not readable parquet: {str(error).splitlines()[0]}") from None
