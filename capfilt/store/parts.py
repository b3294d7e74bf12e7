"""Part files: annotations of some rows, with a digest that reveals any changed byte.

A part is done if its file exists and is intact; nothing else records progress.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.schema import ANNOTATIONS
from capfilt.store.storage import Local, Storage

_MARK, _ARRAY = b"sha256::", b"\x93NUMPY"
_SEAL = len(_MARK) + 32
_SLOW = 1e-3
"""Seconds per file above which storage counts as slow, and several files are read at once."""


class DamagedPart(ValueError):
    """A part file has changed since it was written."""


def name_of(pid: str) -> str:
    return f"parts/{pid[:2]}/{pid}.parquet"


def encode(table: pa.Table, facts: dict[str, str], group: int | None = None) -> bytes:
    """Encode a table as a sealed parquet file in row groups of `group` rows, with `facts` as its file metadata."""
    table = table.replace_schema_metadata({f"capfilt.{name}": value for name, value in facts.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group, compression="zstd")
    return _seal(buffer.getvalue())


def _seal(content: bytes) -> bytes:
    """Insert the SHA-256 of a parquet file between its pages and its footer.

    The footer holds offsets from the start of the file and is located from its end, so readers skip the digest.
    """
    at = _footer(content)
    return content[:at] + _MARK + hashlib.sha256(content).digest() + content[at:]


def encode_array(array: np.ndarray) -> bytes:
    """Encode an array as a sealed .npy file; its digest follows the numbers, where readers do not look."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    return content + _MARK + hashlib.sha256(content).digest()


def decode_array(content: bytes) -> np.ndarray:
    """Decode the array of a sealed file. DamagedPart if the file has changed."""
    check(content)
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedPart(f"it is no array ({error})") from None


def _footer(content: bytes) -> int:
    if len(content) < 12 or content[-4:] != b"PAR1":
        raise DamagedPart("it is cut short")
    at = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    if at < 4:
        raise DamagedPart("its footer is damaged")
    return at


def check(content: bytes) -> None:
    """Raise DamagedPart unless the file is unchanged, byte for byte."""
    at = len(content) if content.startswith(_ARRAY) else _footer(content)
    seal = content[at - _SEAL : at]
    if not seal.startswith(_MARK) or at < _SEAL:
        raise DamagedPart("its seal is missing")
    h = hashlib.sha256(content[: at - _SEAL])
    h.update(content[at:])
    if h.digest() != seal[len(_MARK) :]:
        raise DamagedPart("its digest does not agree with its bytes")


def decode(content: bytes, columns: list[str] | None = None) -> pa.Table:
    """Decode the table of a sealed file. DamagedPart if the file has changed."""
    check(content)
    return pq.read_table(io.BytesIO(content), columns=columns, use_threads=False)


def facts_of(content: bytes) -> dict[str, str]:
    """Read the file metadata that `encode` was given."""
    metadata = pq.read_schema(io.BytesIO(content)).metadata or {}
    return {k.decode().removeprefix("capfilt."): v.decode() for k, v in metadata.items() if k.startswith(b"capfilt.")}


class Parts:
    """The part files of a run."""

    folder, suffix = "parts", ".parquet"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def name(self, pid: str) -> str:
        return name_of(pid)

    def present(self) -> dict[str, tuple[int, float]]:
        """List the part ids that have a file -> (bytes, time of the last change)."""
        files = self.storage.listing(self.folder)
        mine = {name: facts for name, facts in files.items() if name.endswith(self.suffix)}
        return {name.rsplit("/", 1)[-1].removesuffix(self.suffix): facts for name, facts in mine.items()}

    def whole(self, wanted: Iterable[str]) -> tuple[set[str], dict[str, str]]:
        """Return the finished parts among the wanted, and the damaged ones with the reason.

        In a folder every file is read and compared with its digest; an object store does that itself.
        """
        present = self.present().keys() & set(wanted)
        if not isinstance(self.storage, Local):
            return set(present), {}
        damaged: dict[str, str] = {}

        def read_one(pid: str) -> None:
            try:
                check(self.storage.read(self.name(pid)))
            except PermissionError:  # whole for who may read it, and not to be scored again
                raise
            except (DamagedPart, OSError) as error:
                damaged[pid] = str(error)

        waiting, start = iter(sorted(present)), time.monotonic()
        for n, pid in enumerate(waiting, 1):
            read_one(pid)
            if n % 100 == 0 and time.monotonic() - start > _SLOW * n:
                break
        with ThreadPoolExecutor(
            8
        ) as pool:  # of no use on a quick disk, where threads would only get in each other's way
            list(pool.map(read_one, waiting))
        return set(present - damaged.keys()), damaged

    def exists(self, pid: str) -> bool:
        return self.storage.exists(self.name(pid))

    def commit(self, pid: str, table: pa.Table, facts: dict[str, str]) -> int:
        """Write a part, all or nothing; an existing one is replaced by the same content. Returns bytes."""
        content = encode(table.cast(ANNOTATIONS), facts)
        self.storage.write(name_of(pid), content)
        return len(content)

    def read(self, pid: str, columns: list[str] | None = None) -> pa.Table:
        """Read a part's annotations. DamagedPart, naming the file, if it is not intact."""
        try:
            return decode(self.storage.read(name_of(pid)), columns)
        except DamagedPart as error:
            raise DamagedPart(
                f"{self.storage.root}/{name_of(pid)}: {error}; run `score` again, which redoes it"
            ) from None


FAILURES = "failures"
"""Folder of the notes on attempts at scoring; each kind of pass has its own."""


def failures(storage: Storage, folder: str = FAILURES) -> dict[str, list[int]]:
    """List attempts that were begun and not finished: part id -> numbers."""
    attempts: dict[str, list[int]] = {}
    for name in storage.listing(folder):
        pid, _, rest = name.rsplit("/", 1)[-1].partition(".")
        number = rest.removesuffix(".json")
        if number.isdigit():
            attempts.setdefault(pid, []).append(int(number))
    return attempts


def failure_name(pid: str, attempt: int, folder: str = FAILURES) -> str:
    return f"{folder}/{pid}.{attempt}.json"


def read_failure(storage: Storage, pid: str, attempt: int, folder: str = FAILURES) -> dict:
    """Read the note of an attempt; empty if it was removed meanwhile or is incomplete."""
    try:
        return json.loads(storage.read(failure_name(pid, attempt, folder)))
    except (OSError, ValueError):
        return {}
