"""Storage of a run: a folder, or a prefix in an object store. Writes are atomic."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from blip.files import TEMPORARY, not_written, partial, sha256, sweep, sync
from capfilt.store.faults import fault_point

_ADVICE = "write elsewhere, then give the same command again"
_TRIES = 5
T = TypeVar("T")


class StorageError(OSError):
    """A file could not be written or read; no partial file was left behind."""


class Storage:
    """Files by name under a root; `name` uses forward slashes."""

    root: str
    address: str
    """Address that `open_storage` opens this storage by."""

    def read(self, name: str) -> bytes:
        raise NotImplementedError

    def exists(self, name: str) -> bool:
        raise NotImplementedError

    def listing(self, folder: str) -> dict[str, tuple[int, float]]:
        """List all files under a folder: name -> (bytes, time of the last change); no temporaries."""
        raise NotImplementedError

    def entries(self) -> list[str]:
        """List the names directly under the root, files and folders; no temporaries."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        raise NotImplementedError

    def writing(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a file that gets its name when the block ends without an error."""
        raise NotImplementedError

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as file:
            file.write(content)

    def note(self, name: str, content: bytes) -> None:
        """Write a small file that may be lost if the machine fails."""
        self.write(name, content)

    def sweep(self) -> None:
        """Remove temporary files of dead processes."""

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read(name)).hexdigest()


class Local(Storage):
    """A local folder, or one of a shared file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = self.address = os.path.abspath(os.path.expanduser(str(root)))

    def path(self, name: str) -> Path:
        return Path(self.root, name)

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def listing(self, folder: str) -> dict[str, tuple[int, float]]:
        files: dict[str, tuple[int, float]] = {}
        waiting = [os.path.join(self.root, folder)]
        while waiting:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.name.startswith(TEMPORARY):
                        with contextlib.suppress(FileNotFoundError):
                            info = entry.stat()
                            files[os.path.relpath(entry.path, self.root)] = (info.st_size, info.st_mtime)
        return files

    def entries(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root) if not name.startswith(TEMPORARY))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise StorageError(f"{self.root} is a file; give the name of a folder") from None

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        path = self.path(name)
        unfinished = partial(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                fault_point("commit.before_fsync")
                os.fsync(file.fileno())
            fault_point("commit.after_tmp")
            os.replace(unfinished, path)
            fault_point("commit.after_replace")
            sync(path.parent)
            fault_point("commit.after_dir_fsync")
        except OSError as error:
            raise _explained(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def note(self, name: str, content: bytes) -> None:
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise _explained(path, error) from error

    def sweep(self) -> None:
        sweep(Path(self.root), inside=True)

    def sha256(self, name: str) -> str:
        return sha256(self.path(name))


class Remote(Storage):
    """A prefix in an object store supported by fsspec: a PUT is atomic, and is retried if it fails."""

    def __init__(self, url: str, pause: float = 0.5) -> None:
        import fsspec

        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: {error}") from None
        self.address, self._pause = url, pause

    def _again(self, what: str, action: Callable[[], T]) -> T:
        """Try an action a few times with growing pauses; a missing file is not retried."""
        for attempt in range(_TRIES):
            try:
                return action()
            except FileNotFoundError:
                raise
            except Exception as error:  # every store has exceptions of its own for "busy"
                if attempt == _TRIES - 1:
                    raise StorageError(f"{what} failed {_TRIES} times: {type(error).__name__}: {error}") from error
                time.sleep(self._pause * 2**attempt)
        raise AssertionError

    def _at(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        return self._again(f"reading {self._at(name)}", lambda: self.files.cat_file(self._at(name)))

    def exists(self, name: str) -> bool:
        return bool(self._again(f"looking for {self._at(name)}", lambda: self.files.exists(self._at(name))))

    def listing(self, folder: str) -> dict[str, tuple[int, float]]:
        def list_once() -> dict[str, Any]:
            self.files.invalidate_cache()
            return self.files.find(self._at(folder), detail=True)

        try:
            files = self._again(f"listing {self._at(folder)}", list_once)
        except FileNotFoundError:
            return {}
        start = len(self.root.rstrip("/")) + 1
        return {path[start:]: (int(info.get("size") or 0), _changed(info)) for path, info in files.items()}

    def entries(self) -> list[str]:
        def list_once() -> list[str]:
            self.files.invalidate_cache()
            return self.files.ls(self.root, detail=False)

        try:
            paths = self._again(f"listing {self.root}", list_once)
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in paths} - {""})

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._again(f"removing {self._at(name)}", lambda: self.files.rm_file(self._at(name)))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:
            yield file

            def put() -> None:
                file.seek(0)
                with self.files.open(self._at(name), "wb") as target:
                    shutil.copyfileobj(file, target, 1 << 20)

            self._again(f"writing {self._at(name)}", put)


def _changed(info: dict[str, Any]) -> float:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if value is not None:
            return float(value) if isinstance(value, int | float) else getattr(value, "timestamp", lambda: 0.0)()
    return 0.0


def open_storage(where: str | Path) -> Storage:
    """Open the storage at a path or an address in an object store."""
    return Remote(str(where)) if "://" in str(where) else Local(where)


def _explained(path: Path, error: OSError) -> StorageError:
    explained = StorageError(not_written(path, _ADVICE, error))
    explained.errno = error.errno
    return explained


def host() -> str:
    return socket.gethostname()
