"""Embeddings as files, in the layout of clip-retrieval: the same row of all files of one number is one pair.

img_emb/img_emb_0.npy          (rows, E) float16, length 1
text_emb/text_emb_0.npy        likewise, where there are texts
metadata/metadata_0.parquet    image_path, caption and other plain columns
"""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NAMES = re.compile(r"img_emb/img_emb_\d+\.npy|text_emb/text_emb_\d+\.npy|metadata/metadata_\d+\.parquet")


class Names(NamedTuple):
    """Names of the files of one number."""

    image: str
    text: str
    metadata: str


def names(number: int, count: int) -> Names:
    """Return the names of files number `number` of `count`, numbers padded to the same width."""
    n = f"{number:0{len(str(count))}d}"
    return Names(f"img_emb/img_emb_{n}.npy", f"text_emb/text_emb_{n}.npy", f"metadata/metadata_{n}.parquet")


def vectors(values: np.ndarray) -> bytes:
    """Encode vectors (rows, E) as a .npy file of float16, each of length 1. ValueError if one has no direction."""
    values = np.asarray(values, dtype=np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if bad := np.flatnonzero(~(lengths[:, 0] > 0) | ~np.isfinite(lengths[:, 0])).tolist():
        raise ValueError(f"row {bad[0]} is no embedding: its length is {lengths[bad[0], 0]:g}")
    buffer = io.BytesIO()
    np.save(buffer, (values / lengths).astype(np.float16), allow_pickle=False)
    return buffer.getvalue()


def table(columns: dict[str, Any], schema: pa.Schema) -> bytes:
    """Encode the columns of a metadata file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer)
    return buffer.getvalue()
