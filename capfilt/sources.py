"""The files that a run reads, on this machine or in an object store, and the identity of each."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blip.data.formats.folder import ImagesWithSidecars

HUB = "hf:"
"""Prefix of the name of a data set on the hub."""
REMOTE = ("s3://", "gs://", "gcs://", "az://", "abfs://", "abfss://", "hf://", "memory://")
_HEAD, _SPOTS, _SPOT = 1 << 16, 16, 1 << 12


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """An input file (or data set) as it was when the plan was made."""

    kind: str
    """Format: tar, listed, parquet or hosted."""
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
    """Damage of a file that is only partly readable."""
    declared: int | None = None
    """Number of rows according to the crawl's own statistics."""
    notes: tuple[str, ...] = ()


def is_remote(path: str) -> bool:
    return path.startswith(REMOTE)


def open_file(path: str) -> IO[bytes]:
    """Open a local or remote file for reading; it can seek."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def read_range(path: str, start: int, size: int, opened: int | None = None) -> bytes:
    """Read `size` bytes of a file from `start`; `opened` is its descriptor if it is open. OSError for fewer."""
    if opened is not None:
        content = os.pread(opened, size, start)
    elif is_remote(path):
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
    """Return (bytes, time of the last change, the store's tag or None). FileNotFoundError if the file is gone.

    Both numbers are 0 for a folder of images with side-cars, whose files have sizes and times of their own.
    """
    if not is_remote(path):
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            return 0, 0.0, None
        return info.st_size, info.st_mtime, None
    import fsspec

    files, inside = fsspec.core.url_to_fs(path)
    files.invalidate_cache()
    info = files.info(inside)
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("checksum")
    return int(info["size"]), 0.0, str(tag) if tag else None


def content_of(path: str) -> str:
    """Hash a file's size, beginning, end and 16 places between: quick for any size.

    Of a folder, the names and sizes of its images and all captions in side-cars.
    """
    if not is_remote(path) and os.path.isdir(path):
        return ImagesWithSidecars(Path(path)).identity()[:16]
    size, _, tag = stat_of(path)
    h = hashlib.sha256(f"{size} {tag or ''}".encode())
    if tag is None:
        with open_file(path) as file:
            h.update(file.read(_HEAD))
            for i in range(1, _SPOTS + 1):
                file.seek(max(0, (size - _SPOT) * i // _SPOTS))
                h.update(file.read(_SPOT))
    return h.hexdigest()[:16]


def dataset_content(path: str) -> str | None:
    """Hash the files of a saved data set; None for one on the hub, whose revision fixes it."""
    if path.startswith(HUB):
        return None
    h = hashlib.sha256()
    for file in sorted(Path(path).rglob("*.arrow")):
        h.update(f"{file.relative_to(path)} {content_of(str(file))}".encode())
    return h.hexdigest()[:16]


def changed(source: PlannedSource) -> str | None:
    """Describe how a source differs from the plan; None if it does not, as for a file that was only copied."""
    if source.kind == "hosted":
        now = dataset_content(source.path)
        return None if now in (None, source.content) else "the data set has other content now"
    try:
        size, mtime, _ = stat_of(source.path)
    except FileNotFoundError:
        return "the file is gone"
    if size != source.size:
        return f"the file had {source.size:,} bytes and has {size:,} now"
    untimed = is_remote(source.path) or os.path.isdir(source.path)
    if (untimed or mtime != source.mtime) and content_of(source.path) != source.content:
        return "its content is another now"
    return None
