"""Contents of an export's files, counted by opening them, to check its manifest."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip.data.formats.tars import Member, read_headers
from blip.errors import DataError
from capfilt.store.storage import Local, Storage

BEGUN = "_BEGUN"
"""Marker of an unfinished export, with its settings."""
MARKERS = ("_SUCCESS", BEGUN)
OURS = re.compile(r"\d{5,}\.(tar|parquet)|captions\.json|uids\.npy|images/\d{5,}/\d{9,}\.\w+|_SUCCESS|_BEGUN")
"""Names of the files that exports write."""
COUNTED = ("images", "pairs", "samples")
_ROWS = 1024


class DamagedExport(ValueError):
    """A file of an export is not of the export's format."""


def count(storage: Storage, form: str, names: Iterable[str]) -> dict[str, int]:
    """Count samples, images and pairs (texts, each with its image) in the files of an export.

    uid files do not contain the number of pairs. DamagedExport names a file that cannot be read.
    """
    names = sorted(names)
    counts, last = dict.fromkeys(COUNTED, 0), None
    for name in names:
        if name.startswith("images/"):
            continue
        try:
            with _opened(storage, name) as file:
                # The samples of an image are neighbours, the last of a file and the first of the next as well.
                for image, some in groupby(_READERS[form](file, name), key=lambda sample: sample[0]):
                    texts = [n for _, n in some]
                    counts["samples"] += len(texts)
                    counts["pairs"] += sum(texts)
                    counts["images"] += image != last
                    last = image
        except (DamagedExport, DataError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DamagedExport(f"{storage.root}/{name} cannot be read as {form} ({error})") from None
    if form == "uids":
        del counts["pairs"]
    stored = sum(name.startswith("images/") for name in names)
    if form == "json" and stored != counts["images"]:
        raise DamagedExport(f"{storage.root} has {stored:,} image files, captions.json names {counts['images']:,}")
    return counts


def _opened(storage: Storage, name: str) -> IO[bytes]:
    return storage.path(name).open("rb") if isinstance(storage, Local) else io.BytesIO(storage.read(name))


def _tar_samples(file: IO[bytes], name: str) -> Iterator[tuple[str, int]]:
    headers = read_headers(file, name)
    if headers.damage or headers.twice:
        raise DamagedExport(headers.damage or f"{headers.twice[0]} is in it twice")
    for sample in headers.samples:
        if sample.image.size <= 0:
            raise DamagedExport(f"sample {sample.key} has no image")
        note = json.loads(_member(file, sample.json))
        captions = note["caption"]
        if isinstance(captions, str) and _member(file, sample.text) != captions.encode():
            raise DamagedExport(f"the .txt and .json members of sample {sample.key} differ")
        yield note["sample_id"], _texts(captions)


def _member(file: IO[bytes], member: Member) -> bytes:
    if member.size < 0:
        raise DamagedExport("a sample lacks its .txt or .json member")
    file.seek(member.offset)
    return file.read(member.size)


def _texts(captions: Any) -> int:
    """Count the texts of a caption entry, which is one text or a list."""
    some = [captions] if isinstance(captions, str) else captions
    if not isinstance(some, list) or not some or not all(isinstance(text, str) for text in some):
        raise DamagedExport("a sample has no text")
    return len(some)


def _parquet_samples(file: IO[bytes], name: str) -> Iterator[tuple[str, int]]:
    table = pq.ParquetFile(file)
    for batch in table.iter_batches(_ROWS, columns=["sample_id", "caption", "image"], use_threads=False):
        images = batch["image"].field("bytes")
        if images.null_count or b"" in images.to_pylist():
            raise DamagedExport("a sample has no image")
        for sample_id, captions in zip(batch["sample_id"].to_pylist(), batch["caption"].to_pylist(), strict=True):
            yield sample_id, _texts(captions)


def _listed_samples(file: IO[bytes], name: str) -> Iterator[tuple[str, int]]:
    for sample in json.load(file):
        yield sample["image"], _texts(sample["caption"])


def _uids(file: IO[bytes], name: str) -> Iterator[tuple[tuple[int, int], int]]:
    """Count the images of a uid file, which does not contain numbers of texts."""
    uids = np.load(file, allow_pickle=False)
    if uids.dtype != np.dtype("u8,u8"):
        raise DamagedExport(f"the type is {uids.dtype}, not two u8")
    yield from ((tuple(uid), 0) for uid in uids.tolist())


_READERS: dict[str, Callable[[IO[bytes], str], Iterator[tuple[Any, int]]]] = {
    "wds": _tar_samples,
    "parquet": _parquet_samples,
    "json": _listed_samples,
    "uids": _uids,
}
