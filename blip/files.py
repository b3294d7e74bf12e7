"""Atomic writing of files and folders, and one message for a write that failed.

Imports nothing heavy: checkpoints are built on it, and CapFilt's jobs, which start without torch.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from blip.errors import Stopped

TEMPORARY = ".tmp-"
"""Prefix of the names of temporaries."""
_WRITER = re.compile(re.escape(TEMPORARY) + r".+-([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}")
"""Name of a temporary: its target, the writer's machine and process, and the start time."""
_STALE = 3600.0
"""Seconds without a change after which another machine's temporary is taken for abandoned."""
_CLOCK = 60.0
"""Seconds by which two readings of a process's start time may differ."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path | None:
    """The user's folder for what can be computed again: OPENBLIP_CACHE, or openblip in XDG_CACHE_HOME or ~/.cache.

    None if the user has no home.
    """
    own, users = os.environ.get("OPENBLIP_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    folder = os.path.expanduser(own or os.path.join(users if os.path.isabs(users) else "~/.cache", "openblip"))
    return None if folder.startswith("~") else Path(os.path.abspath(folder))


def sync(path: Path) -> None:
    """Sync a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial(path: Path) -> Path:
    """Temporary name of a file or folder while it is written, before it is renamed to `path`.

    Temporaries of dead writers in the same folder are removed first, once per process.
    """
    _sweep_once(str(path.parent.absolute()), os.getpid())
    # Long names are cut to leave room for the writer; the end of the name makes it unique.
    return path.with_name(
        f"{TEMPORARY}{os.fsencode(path.name)[:120].decode(errors='ignore')}-{_me()}-{uuid.uuid4().hex[:8]}"
    )


@functools.lru_cache(1024)
def _sweep_once(folder: str, process: int) -> None:
    sweep(Path(folder))


def sweep(folder: Path, *, inside: bool = False) -> None:
    """Remove temporaries of dead writers from a folder, with `inside` also from its subfolders.

    A writer on this machine is looked up; one on another is taken for dead after an hour without a change. Temporaries
    of live writers, and files not named by `partial`, are left alone.
    """
    for path in folder.glob(f"**/{TEMPORARY}*" if inside else f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if _abandoned(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _abandoned(path: Path) -> bool:
    written_by = _WRITER.fullmatch(path.name)
    if written_by is None:
        return False
    machine, process, began = written_by.groups()
    if machine != _machine():
        changed = [path.lstat().st_mtime, *(inner.lstat().st_mtime for inner in path.rglob("*"))]
        return max(changed) < time.time() - _STALE
    alive = _began(int(process))
    return alive is None or abs(alive - int(began)) > _CLOCK


def _me() -> str:
    return f"{_machine()}-{os.getpid()}-{_began(os.getpid()) or 0:.0f}"


@functools.cache
def _machine() -> str:
    """Identity of the process namespace: differs between machines, and between containers on one."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


def _began(process: int) -> float | None:
    """Start time of a process, in seconds of the clock; None if there is none."""
    import psutil

    try:
        info = psutil.Process(process)
        return None if info.status() == psutil.STATUS_ZOMBIE else info.create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:  # there is one, and nothing says that it is another
        return math.nan


@contextlib.contextmanager
def ordinary_mode(path: Path) -> Iterator[None]:
    """Context for writing a file: gives it the usual permissions of a new file, even if a library sets others.

    safetensors 0.8 makes a file readable by its writer only, so that no other user could load a model.
    """
    with path.open("ab"):  # created with the usual permissions, from the umask or the folder
        pass
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


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


def not_permitted(error: PermissionError) -> str:
    """Message for a file that this user may not use: its name, its owner, and what the owner can do."""
    if error.filename is None:
        return str(error)
    path = Path(os.fsdecode(error.filename))
    message = f"{path}: permission denied"
    with contextlib.suppress(OSError, KeyError, AttributeError, ImportError):  # Windows has no owners
        closed = next((part for part in reversed(path.parents) if not os.access(part, os.X_OK)), path)
        info = closed.stat()
        whose = f"{closed} belongs to {_user(info.st_uid)} and has mode {stat.S_IMODE(info.st_mode):03o}"
        remedy = "its owner can open it with chmod, or run this as its owner"
        message += f" ({whose}; this is {_user(os.geteuid())}): {remedy}"
    return message


def _user(number: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"


def not_written(path: Path, advice: str, error: BaseException | None = None, needs: int | None = None) -> str:
    """Message for a file that could not be written: path, bytes needed and free, and, for a full disk, what to do."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    full = getattr(error, "errno", None) in _FULL or (needs is not None and free < needs)
    sentences = [
        f"could not write {path}: {'' if needs is None else f'needs about {needs:,} bytes, '}{free:,} bytes are free."
    ]
    sentences += [f"Free some space or {advice}."] if full else []
    sentences += [f"The reason given: {getattr(error, 'strerror', None) or error}"] if error is not None else []
    return " ".join(sentences)


MANIFEST = "MANIFEST.json"
_ADVICE = "lower train.keep_checkpoints"


class WriteError(Stopped):
    """A file could not be written; nothing is left of it."""


def checkpoint_event(event: str, path: Path) -> None:
    """Called before and after each write, rename and removal; tests crash the process here."""


def write_directory(
    target: Path, writers: dict[str, tuple[Callable[[Path], None], int]], facts: dict | None = None
) -> None:
    """Write files into a new directory, all or nothing.

    `writers` maps a file name to a function that writes it and the approximate bytes needed. With `facts`, a manifest
    with them and each file's size and SHA-256 is written last; then the directory gets its name in one rename.
    WriteError, naming the path and the bytes needed and free, if the disk is full or writing fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_space(target, sum(size for _, size in writers.values()))
    unfinished = partial(target)
    unfinished.mkdir()
    try:
        files = {name: _write_one(unfinished / name, write, size) for name, (write, size) in writers.items()}
        if facts is not None:
            manifest = json.dumps({**facts, "files": files}, indent=1).encode()
            _write_one(unfinished / MANIFEST, lambda path: write_bytes(path, manifest), len(manifest))
        sync(unfinished)
        checkpoint_event("before rename", target)
        os.rename(unfinished, target)
        sync(target.parent)
        checkpoint_event("after rename", target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def clear_unfinished(parent: Path) -> None:
    """Remove temporaries of a killed process; only for folders without other writers."""
    for unfinished in parent.glob(f"{TEMPORARY}*"):
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def _write_one(path: Path, write: Callable[[Path], None], size: int) -> dict[str, str | int]:
    checkpoint_event("before write", path)
    with explain_write(path, size):
        with ordinary_mode(path):
            write(path)
        checkpoint_event("after write", path)
        sync(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def replace_file(path: Path, content: bytes, advice: str = _ADVICE) -> None:
    """Give a file new content in one rename, so that a reader sees the old or the new.

    `advice` is what a user with a full disk can do beside freeing space.
    """
    unfinished = partial(path)
    try:
        with explain_write(path, len(content), advice):
            write_bytes(unfinished, content)
            checkpoint_event("before replace", path)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def explain_write(path: Path, size: int, advice: str = _ADVICE) -> Iterator[None]:
    """Turn any library's error about a failed write into one message."""
    try:
        yield
    # torch and safetensors say of a full disk what they saw of it: unexpected positions, errno in a text.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WriteError(not_written(path, advice, error, size)) from error


def _require_space(target: Path, size: int) -> None:
    if shutil.disk_usage(target.parent).free < size:
        raise WriteError(not_written(target, _ADVICE, needs=size))


def check_manifest(directory: Path) -> dict:
    """Check a directory's files against its manifest and return it; ValueError names the first that differs.

    PermissionError for a file that may not be read, whose contents are then unknown.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = manifest["files"].items()
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    for name, expected in files:
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, its manifest says {expected['bytes']:,}")
        if sha256(file) != expected["sha256"]:
            raise ValueError(f"{file} does not have the SHA-256 of its manifest")
    return manifest
