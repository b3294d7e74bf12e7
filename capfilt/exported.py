"""Contents of an export's files, counted by opening them, to check its manifest."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, zip_longest
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip.data import embeddings
from blip.data.formats.tars import Member, is_exported, read_headers
from blip.errors import DataError
from capfilt.store.storage import Local, Storage

BEGUN = "_BEGUN"
"""Marker of an unfinished export, with its settings."""
MARKERS = ("_SUCCESS", BEGUN)
WITH_IMAGES = ("wds", "parquet", "json", "labelstudio", "fiftyone")
"""Formats that hold the images."""
OURS = re.compile(
    r"((jpg|png|webp|gif|bmp|tif|avif|heic)/)?\d{5,}\.tar|\d{5,}\.parquet|captions\.json|metadata\.jsonl|tasks\.json|"
    r"config\.xml|samples\.jsonl|load\.py|uids\.npy|images/\d{5,}/\d{9,}\.\w+|_SUCCESS|_BEGUN|"
    + embeddings.NAMES.pattern
)
"""Names of the files that exports write."""
COUNTED = ("images", "pairs", "samples")
_LISTS = {"json": "captions.json", "labelstudio": "tasks.json", "fiftyone": "samples.jsonl"}
"""Lists of samples whose images are files under images/, by format."""
_ROWS = 1024


class DamagedExport(ValueError):
    """A file of an export is not of the export's format."""


_UNREADABLE = (
    DamagedExport, DataError, ValueError, KeyError, TypeError, AttributeError, EOFError, pa.ArrowException
)  # fmt: skip


def count(storage: Storage, form: str, names: Iterable[str]) -> dict[str, int]:
    """Count samples, images and pairs (texts, each with its image) in the files of an export.

    uid files do not contain the number of pairs. DamagedExport names a file that cannot be read.
    """
    names = sorted(names)
    listed, read = _READERS[form]
    counts, last, rows = dict.fromkeys(COUNTED, 0), None, Counter[str]()
    for name in filter(listed.fullmatch, names):
        rows[name] = 0
        try:
            with _opened(storage, name) as file:
                # The samples of an image are neighbours, the last of a file and the first of the next as well.
                for image, some in groupby(read(file, name), key=lambda sample: sample[0]):
                    texts = [n for _, n in some]
                    rows[name] += len(texts)
                    counts["pairs"] += sum(texts)
                    counts["images"] += image != last
                    last = image
        except _UNREADABLE as error:
            raise DamagedExport(f"{storage.root}/{name} cannot be read as {form} ({error})") from None
    counts["samples"] = rows.total()
    if form == "uids":
        del counts["pairs"]
    stored = sum(name.startswith("images/") for name in names)
    if form in _LISTS and stored != counts["images"]:
        raise DamagedExport(f"{storage.root} has {stored:,} image files, {_LISTS[form]} names {counts['images']:,}")
    if form in _BESIDE:
        _check_beside(storage, form, names, rows)
    return counts


def _check_beside(storage: Storage, form: str, names: Sequence[str], rows: Counter[str]) -> None:
    """Check that files beside those with samples, one for each, have as many rows."""
    listed, count_rows = _BESIDE[form]
    beside = [name for name in names if listed.fullmatch(name)]
    for name, other in zip_longest(rows, beside):
        if name is None or other is None:
            raise DamagedExport(f"{storage.root} has {len(rows)} lists of samples and {len(beside)} files beside them")
        try:
            with _opened(storage, other) as file:
                n = count_rows(file)
        except _UNREADABLE as error:
            raise DamagedExport(f"{storage.root}/{other} cannot be read as {form} ({error})") from None
        if n != rows[name]:
            raise DamagedExport(f"{storage.root}/{other} has {n:,} rows, {name} {rows[name]:,}")


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
        captions = note["captions"] if is_exported(note) else note["caption"]  # the latter in exports of version 1
        n = _texts(captions)
        first = captions if isinstance(captions, str) else captions[0]
        if (sample.text.size >= 0 or is_exported(note)) and _member(file, sample.text) != first.encode():
            raise DamagedExport(f"the .txt and .json members of sample {sample.key} differ")
        yield note["sample_id"], n


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


def _tasks(file: IO[bytes], name: str) -> Iterator[tuple[str, int]]:
    for task in json.load(file):
        yield task["data"]["image"], _texts(task["data"]["text"])


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[str, int]]:
    for line in file:
        sample = json.loads(line)
        yield sample["filepath"], _texts(sample["captions"])


def _embedded(file: IO[bytes], name: str) -> Iterator[tuple[str, int]]:
    table = pq.read_table(file, columns=["sample_id", "texts"], use_threads=False)
    yield from zip(table["sample_id"].to_pylist(), table["texts"].to_pylist(), strict=True)


def _uids(file: IO[bytes], name: str) -> Iterator[tuple[tuple[int, int], int]]:
    """Count the images of a uid file, which does not contain numbers of texts."""
    uids = np.load(file, allow_pickle=False)
    if uids.dtype != np.dtype("u8,u8"):
        raise DamagedExport(f"the type is {uids.dtype}, not two u8")
    yield from ((tuple(uid), 0) for uid in uids.tolist())


_READERS: dict[str, tuple[re.Pattern[str], Callable[[IO[bytes], str], Iterator[tuple[Any, int]]]]] = {
    "wds": (re.compile(r".*\.tar"), _tar_samples),
    "parquet": (re.compile(r".*\.parquet"), _parquet_samples),
    "json": (re.compile(r"captions\.json"), _listed_samples),
    "labelstudio": (re.compile(r"tasks\.json"), _tasks),
    "fiftyone": (re.compile(r"samples\.jsonl"), _lines),
    "embeddings": (re.compile(r"metadata/.*\.parquet"), _embedded),
    "uids": (re.compile(r"uids\.npy"), _uids),
}
"""Names of the files with samples, and the function that counts (image, texts) of each sample."""


def _rows_of_vectors(file: IO[bytes]) -> int:
    values = np.load(file, allow_pickle=False)
    if values.dtype != np.float16 or values.ndim != 2:
        raise DamagedExport(f"it holds {values.dtype} {values.shape}, not float16 (rows, E)")
    return len(values)


def _rows_of_metadata(file: IO[bytes]) -> int:
    return sum(isinstance(json.loads(line)["file_name"], str) for line in file)


_BESIDE: dict[str, tuple[re.Pattern[str], Callable[[IO[bytes]], int]]] = {
    "json": (re.compile(r"metadata\.jsonl"), _rows_of_metadata),
    "embeddings": (re.compile(r"img_emb/.*\.npy"), _rows_of_vectors),
}
"""Names of the files beside those with samples, and the function that counts their rows."""
