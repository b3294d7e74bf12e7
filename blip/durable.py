"""What every writer of files here shares: bytes that survive a power cut, and one message for a write that failed.

Imports nothing heavy: `blip.atomic` builds checkpoints on it, and CapFilt its runs, which start without torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp-"
"""Beginning of the name of what is being written."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync(path: Path) -> None:
    """Have the disk keep a file, or what a folder lists, before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it survives a power cut."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_written(path: Path, advice: str, error: BaseException | None = None, needs: int | None = None) -> str:
    """Why a file could not be written, in a line: where, the bytes needed and free, and, of a full disk, what to do."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    full = getattr(error, "errno", None) in _FULL or (needs is not None and free < needs)
    said = [
        f"could not write {path}: {'' if needs is None else f'needs about {needs:,} bytes, '}{free:,} bytes are free."
    ]
    said += [f"Free some space or {advice}."] if full else []
    said += [f"The reason given: {getattr(error, 'strerror', None) or error}"] if error is not None else []
    return " ".join(said)
