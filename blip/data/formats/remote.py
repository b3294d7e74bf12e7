"""Files behind addresses: s3://, gs://, hf://, https:// and http://, read in ranges through fsspec.

A `RemoteFile` has what the readers of this folder need of a `Path`, so that they read both with the same code. It keeps
no connection: each process opens its own, and none is used after a fork. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import unquote

from blip import files
from blip.errors import DataError, without_credentials

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "gcs", "hf", "https", "http")
_ADDRESS = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<host>[^/?#]*)(?P<path>[^?#]*)", re.IGNORECASE)
_WEB = ("http", "https")
_TRIES, _TRIES_AGAIN = 6, 2
"""Tries of a request, and of one to a host of which the last could not be met."""
_PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long: 15.5 in all."""
_CONNECT, _SILENCE, _WHOLE = 10.0, 30.0, 120.0
"""Seconds for a connection, between two packets, and for a whole answer."""
_BUFFER = 4 << 20
"""Bytes read ahead where a file is read in sequence."""
_MOST = 16 << 20
"""Most bytes of one request."""
_THREADS = 16
"""Files whose identities and indexes are read at once."""
_BUSY = (408, 425, 429)
"""Statuses of HTTP below 500 after which the same request may succeed."""
_TAGS = ("ETag", "etag", "e_tag", "md5Hash", "md5", "crc32c", "sha256", "blob_id", "Content-MD5", "Digest", "checksum")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "modified", "created")
T = TypeVar("T")
F = TypeVar("F")


class Unreachable(DataError):
    """A file, or a part of one, that could not be read however often it was tried."""


class SourceChanged(DataError):
    """A file is not the one that the run began with."""


class Identity(NamedTuple):
    """What a server says of a file without sending it; the size is named as `os.stat` names it."""

    st_size: int
    tag: str
    """ETag, or else a hash of the contents, or else the time of the last change; empty if it states none."""


def is_address(spec: str) -> bool:
    """Whether a user's path is an address that can be read where the user allows it."""
    match = _ADDRESS.match(spec)
    return match is not None and match["scheme"].lower() in SCHEMES


class RemoteFile:
    """A file behind an address, with the properties and methods of a `Path` that readers use."""

    parent = None
    """There is no folder of this machine that its relative paths could start from."""

    def is_dir(self) -> bool:
        """False: addresses of folders are refused."""
        return False

    def __init__(self, address: str) -> None:
        """Raise DataError for an address that holds a user or password."""
        match = _ADDRESS.match(address)
        assert match is not None
        self.scheme, self.host = match["scheme"].lower(), match["host"]
        rest = address[len(match["scheme"]) :]
        # Only on the web do ? and # end a path; in an object store a name may have them.
        self.address = self.scheme + (rest.split("#")[0] if self.scheme in _WEB else rest)
        path = match["path"] if self.scheme in _WEB else address[match.start("path") :]
        if "@" in self.host:
            raise DataError(
                f"{self} has a user or password in it: leave it out, and give credentials in the environment"
            )
        if path.endswith("/") or not path:
            raise DataError(f"{self} is a folder: write {str(self).rstrip('/')}/*.tar, or the files one by one")
        self.name = PurePosixPath(unquote(path) if self.scheme in _WEB else path).name
        self.suffix, self.stem = PurePosixPath(self.name).suffix, PurePosixPath(self.name).stem

    def __str__(self) -> str:
        return without_credentials(self.address)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def stat(self) -> Identity:
        """Size and tag as they were when first asked for; a read that meets others is refused."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> Identity:
        return _again(self, lambda: _connected(self).identity(self))

    def open(
        self, mode: str = "r", buffering: int = -1, encoding: str | None = None, newline: str | None = None
    ) -> IO[Any]:
        """Open for reading, in sequence by reading ahead; with `buffering` 0 each read is a request."""
        ranges = _Ranges(self)
        reader = io.BufferedReader(ranges, _BUFFER) if buffering else ranges
        return reader if "b" in mode else io.TextIOWrapper(reader, encoding=encoding, newline=newline)

    def read_bytes(self) -> bytes:
        """The whole content."""
        with self.open("rb") as file:
            return file.read()

    def read_text(self, encoding: str | None = None) -> str:
        """The whole content as text."""
        with self.open(encoding=encoding) as file:
            return file.read()

    def read_range(self, start: int, size: int) -> bytes:
        """The bytes from `start`, fewer only at the end of the file. Unreachable, or SourceChanged."""
        stop = min(start + size, self.stat().st_size)
        if stop <= start:
            return b""
        return b"".join(
            _again(self, lambda at=at: _connected(self).read(self, at, min(at + _MOST, stop)))
            for at in range(start, stop, _MOST)
        )

    def cached(self, kind: str, make: Callable[[], bytes], parse: Callable[[bytes], T]) -> T:
        """Parse what `make` reads of the contents, kept in the user's cache folder as long as the file is the same.

        Of several processes of a machine one reads it. What is kept of files without a tag, or damaged, is not used.
        """
        size, tag = self.stat()
        if not tag:
            return parse(make())
        key = hashlib.sha256(json.dumps([kind, str(self), size, tag]).encode()).hexdigest()
        cache = files.cache_folder()
        if cache is None:
            return parse(make())
        path = cache / "remote" / key[:2] / f"{key}.{kind}"
        with _alone(path):
            with contextlib.suppress(Exception):  # missing, or damaged in any way
                return parse(path.read_bytes())
            content = make()
            try:
                files.replace_file(path, content)
            except (OSError, files.WriteError) as error:
                _note_once(f"the index of remote files is not kept for the next start: {error}")
            return parse(content)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Context: no other process of this machine is in it for the same file; without a lock if there can be none."""
    import filelock

    lock = None
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        lock.acquire()
    try:
        yield
    finally:
        if lock is not None and lock.is_locked:
            lock.release()


@functools.cache
def _note_once(message: str) -> None:
    logger.warning("%s", message)


class _Ranges(io.RawIOBase):
    """A remote file as a stream that can seek; it holds a position and nothing else."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at, self._size = file, 0, file.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._file.read_range(self._at, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


# Files that may be here or there --------------------------------------------------------------------------------------


def identity_of(file: Path | RemoteFile) -> list[Any]:
    """What a data set's fingerprint records of a file: name and size, of a remote one address, size and tag."""
    if isinstance(file, RemoteFile):
        return [str(file), *file.stat()]
    return [file.name, file.stat().st_size]


def remote_identities(sources: Iterable[Any]) -> dict[str, list[Any]]:
    """Size and tag of each remote file of some sources, by address."""
    remote = (file for source in sources for file in getattr(source, "files", ()) if isinstance(file, RemoteFile))
    return {str(file): list(file.stat()) for file in remote}


def each(work: Callable[[F], T], chosen: Sequence[F]) -> Iterable[T]:
    """The results of `work` on files, in order; those of remote files are computed by several threads."""
    if not any(isinstance(file, RemoteFile) for file in chosen):
        return map(work, chosen)
    with ThreadPoolExecutor(_THREADS, "remote") as pool:
        return list(pool.map(work, chosen))


# Finding --------------------------------------------------------------------------------------------------------------


def find_remote(address: str, what: str) -> list[RemoteFile]:
    """The file of an address, or those that match a glob in an object store, sorted. DataError if there are none.

    A name that exists literally is not treated as a pattern.
    """
    file = RemoteFile(address)
    path = file.address.split("://", 1)[1]
    if not any(mark in (path.split("?")[0] if file.scheme in _WEB else path) for mark in "*?["):
        return [file]
    if file.scheme in _WEB:
        raise DataError(f"{what} {file}: a web server has no listing to match a glob with; write {{00000..00127}}")
    names = _again(file, lambda: _connected(file).matching(file))
    if names is None:
        return [file]
    if not names:
        raise DataError(f"{what} {file}: no such file")
    return [RemoteFile(f"{file.scheme}://{name}") for name in names]


# Connections ----------------------------------------------------------------------------------------------------------


_down: set[tuple[int, str, str]] = set()
"""Hosts, by process and scheme, that did not answer when last tried; a run must not wait for each sample as long."""


class _Busy(Exception):
    """A fault that may pass."""


def _again(file: RemoteFile, action: Callable[[], T]) -> T:
    """Try an action a few times, with growing pauses, unless its failure is final. Raises DataError."""
    reason, host = "", (os.getpid(), file.scheme, file.host)
    tries = _TRIES_AGAIN if host in _down else _TRIES
    for attempt in range(tries):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            result = action()
            _down.discard(host)
            return result
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(f"{file}: no such file") from None
        except IsADirectoryError:
            raise DataError(f"{file} is a folder: write {file}/*.tar, or the files one by one") from None
        except PermissionError as error:
            hint = "give credentials in the environment, as its library documents"
            raise DataError(f"{file}: access is denied ({_short(error)}); {hint}") from None
        except (ImportError, ValueError, NotImplementedError) as error:
            raise DataError(f"{file} cannot be read: {_short(error)}") from None
        except Exception as error:  # every store has exceptions of its own for "busy"
            reason = _short(error)
    _down.add(host)
    raise Unreachable(f"{file} cannot be read: {reason}; tried {tries} times")


def _short(error: Exception) -> str:
    text = without_credentials(" ".join(str(error).split()))[:200]
    if isinstance(error, _Busy) or (isinstance(error, ImportError) and text):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_stores: dict[tuple[int, str], _Store] = {}
"""Connections by process and scheme. Those of a parent are kept, unused: closing them would disturb the parent's."""


def _connected(file: RemoteFile) -> _Store:
    key = os.getpid(), file.scheme
    if key not in _stores:
        import fsspec

        opened = fsspec.filesystem(file.scheme, skip_instance_cache=True)
        _stores.setdefault(key, (_Web if file.scheme in _WEB else _Store)(opened))
    return _stores[key]


class _Store:
    """An object store, by fsspec's calls."""

    def __init__(self, opened: Any) -> None:
        self.files = opened
        self._same: set[RemoteFile] = set()  # files that this process knows to be those that the run began with

    def matching(self, file: RemoteFile) -> list[str] | None:
        """Paths that match a glob, sorted; None if there is a file of just that name."""
        self.files.invalidate_cache()
        path = self._path(file)
        return None if self.files.isfile(path) else sorted(self.files.glob(path))

    def _path(self, file: RemoteFile) -> str:
        return self.files._strip_protocol(file.address)

    def identity(self, file: RemoteFile) -> Identity:
        """Size and tag of a file now."""
        info = self.files.info(self._path(file))
        if info.get("type") == "directory":
            raise IsADirectoryError
        self._same.add(file)
        return Identity(int(info["size"]), _tag(info))

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Some bytes, all of them."""
        from fsspec.asyn import AsyncFileSystem

        if file not in self._same:
            _refuse_change(file, self.identity(file))
        if isinstance(self.files, AsyncFileSystem):
            content = self.files.cat_file(self._path(file), start=start, end=stop)
        else:
            with self.files.open(self._path(file), "rb", cache_type="none") as opened:
                opened.seek(start)
                content = opened.read(stop - start)
        if len(content) != stop - start:
            raise _Busy(f"{len(content):,} bytes came instead of {stop - start:,}")
        return content


def _tag(info: Any) -> str:
    """The most telling of the properties that a store or server states."""
    return next((str(info[key]) for key in (*_TAGS, *_TIMES) if info.get(key)), "")


def _refuse_change(file: RemoteFile, now: Identity) -> None:
    before = file.stat()
    if now != before:
        raise SourceChanged(
            f"{file} has changed while it was read: it had {before.st_size:,} bytes and tag {before.tag or 'none'}, "
            f"and has {now.st_size:,} and {now.tag or 'none'}; start again with files that stay as they are"
        )


class _Web(_Store):
    """A web server, by fsspec's session: each answer is checked for the range and the identity of the file."""

    def __init__(self, opened: Any) -> None:
        from fsspec.asyn import sync

        super().__init__(opened)
        sync(opened.loop, opened.set_session)  # once, before threads do

    def identity(self, file: RemoteFile) -> Identity:
        return self._get(file, 0, 1)[1]

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        content, now = self._get(file, start, stop)
        _refuse_change(file, now)
        return content

    def _get(self, file: RemoteFile, start: int, stop: int) -> tuple[bytes, Identity]:
        from fsspec.asyn import sync

        return sync(self.files.loop, _get_range, self.files, file, start, stop)


async def _get_range(web: Any, file: RemoteFile, start: int, stop: int) -> tuple[bytes, Identity]:
    import aiohttp

    session = await web.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    given = {**web.kwargs, "headers": {**web.kwargs.get("headers", {}), **headers}}
    given["timeout"] = aiohttp.ClientTimeout(total=_WHOLE, sock_connect=_CONNECT, sock_read=_SILENCE)
    try:
        async with session.get(web.encode_url(file.address), **given) as answer:
            if file.scheme == "https" and answer.url.scheme != "https":
                raise DataError(f"{file} is redirected from https to {answer.url.scheme}, which is refused")
            size = _check(file, answer, start)
            now = Identity(size, _tag(answer.headers))
            if answer.status == 416:  # nothing there: the file is empty, or has become shorter
                return b"", now
            expected, content = min(stop, size) - start, b""
            async for chunk in answer.content.iter_any():
                content += chunk
                if len(content) > max(expected, 0):
                    raise DataError(f"{file}: the server sends more than the range that it was asked for")
            if len(content) < expected:
                raise _Busy(f"the connection ended after {len(content):,} of {expected:,} bytes")
            return content, now
    except (aiohttp.NonHttpUrlRedirectClientError, aiohttp.InvalidUrlRedirectClientError) as error:
        raise DataError(f"{file} is redirected to {_short(error)}, which is refused; only http and https are") from None
    except aiohttp.TooManyRedirects:
        raise DataError(f"{file} is redirected again and again") from None


def _check(file: RemoteFile, answer: Any, start: int) -> int:
    """Check the head of an answer, and return the size of the whole file."""
    status, headers = answer.status, answer.headers
    if status in (404, 410):
        raise FileNotFoundError
    if status in (401, 403, 407):
        raise PermissionError(f"status {status}")
    if status in _BUSY or status >= 500:
        raise _Busy(f"the server answered with status {status}")
    ranged = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("Content-Range", "").strip())
    if status == 416 and ranged and int(ranged[2]) <= start:
        return int(ranged[2])
    if status == 200 and headers.get("Content-Length") == "0":  # some servers have no ranges of an empty file
        return 0
    if status == 200:
        raise DataError(
            f"{file}: the server ignores ranges (it answers 200 with the whole file, not 206), so single samples "
            "cannot be read: use another server, or download the file"
        )
    if status != 206 or not ranged or ranged[1] is None or int(ranged[1]) != start:
        raise DataError(f"{file}: the server answered with status {status} and no range from byte {start:,}")
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DataError(
            f"{file}: the server sends it compressed ({headers['Content-Encoding']}), and ranges of that are not "
            "ranges of the file: turn compression off for it"
        )
    return int(ranged[2])
