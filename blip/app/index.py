"""An index of a folder's images: their joint embeddings on disk, updated when files change.

    model = blip.load("runs/base/model")
    index = Index.read(folder, where) or Index(folder, where, IndexOrigin.of(model, "runs/base/model", "float32"))
    index = index.updated(paths, index.stale(paths), model)
    values, rows = index.nearest(model.embed_text("a red bicycle"), 10)

`index.json` lists the files and names the safetensors file with their embeddings; it is replaced last and in one
rename, so a reader sees the old or the new index. If it has to be written and the folder is read-only, it moves to the
user's cache folder. N images, E embedding width, Q queries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blip import files
from blip.app.answers import Answers
from blip.app.commands.shared import MODEL_VARIABLE
from blip.app.loaded import Loaded
from blip.data.image_files import ImageFile, read_images
from blip.errors import DataError
from blip.tensors import add_to_digest, read_tensors, write_tensors

if TYPE_CHECKING:
    from blip.data.image_files import InputImages

FORMAT, VERSION = "openblip-index", 1
_LIST = "index.json"
_NAME = re.compile(r"embeddings-[0-9a-f]{16}\.safetensors")
_SAVE_SECONDS = 60.0
"""Seconds between two saves while an index is built, so that an interrupted build can continue."""
_GONE = (0, 0)
"""Size and modification time of a file that is not there, such as the target of a link."""
_UNLISTED_SECONDS = 60.0
"""Age in seconds after which unlisted embeddings are taken to be left by a killed process."""


@dataclass(frozen=True)
class IndexOrigin:
    """The model and precision that an index was built with."""

    name: str
    """Name of the model, as given."""
    weights: str
    """Start of the SHA-256 of the image encoder and its projection."""
    precision: str
    """Numeric precision."""

    def __str__(self) -> str:
        return f"{self.name} (image encoder {self.weights}, {self.precision})"

    def same(self, other: IndexOrigin) -> bool:
        """Whether embeddings of the two can be compared; names are ignored."""
        return (self.weights, self.precision) == (other.weights, other.precision)

    @classmethod
    def of(cls, model: Loaded, name: str, precision: str) -> IndexOrigin:
        digest = hashlib.sha256(model.transform.describe().encode())
        for part in ("vision", "image_proj"):
            add_to_digest(digest, getattr(model.model, part).state_dict(), f"{part}.")
        return cls(name, digest.hexdigest()[:12], precision)


@dataclass(frozen=True)
class Entry:
    """A file's state when it was indexed."""

    path: str
    """Path relative to the indexed folder."""
    size: int
    mtime_ns: int
    sha256: str
    """SHA-256 of the file, hexadecimal; empty if it could not be read."""
    reason: str = ""
    """Reason why the file has no embedding; empty if it has one."""


@dataclass
class Index:
    """Images of a folder with their embeddings."""

    folder: Path
    where: Path
    """Folder of the index."""
    origin: IndexOrigin
    entries: list[Entry] = field(default_factory=list)
    """Readable and unreadable files, in natural order of their names."""
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """Embeddings (N, E) float32 of the readable files in order."""

    def __post_init__(self) -> None:
        self.readable = [entry for entry in self.entries if not entry.reason]
        if len(self.readable) != len(self.embeddings):
            raise ValueError(f"{len(self.readable)} images have {len(self.embeddings)} embeddings")

    def paths(self, rows: Sequence[int]) -> list[Path]:
        """Paths of the images of some rows of `embeddings`."""
        return [self.folder / self.readable[row].path for row in rows]

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest cosines with embeddings (Q, E), and their rows: (Q, K) each, best first; K = min(k, N).

        Equal ones, such as of files with the same bytes, are in the order of the rows. A plain matrix product: 14 ms
        per query among 100,000 images and 0.14 s among a million (one core, E = 256), about as long as encoding the
        text, so an approximate search would gain little.
        """
        # Rounded, as the product of the same two vectors may differ in its last bit from column to column.
        cosines = (queries.float().cpu() @ self.embeddings.T).round(decimals=6)
        count = min(k, cosines.shape[1])
        if not count:
            return cosines[:, :0], torch.empty(len(cosines), 0, dtype=torch.long)
        best = []
        for row, least in zip(cosines, cosines.topk(count, dim=1).values[:, -1], strict=True):
            near = torch.nonzero(row >= least)[:, 0]
            best.append(near[row[near].sort(descending=True, stable=True).indices[:count]])
        rows = torch.stack(best) if best else torch.empty(0, count, dtype=torch.long)
        return cosines.gather(1, rows), rows

    # Files --------------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path, where: Path) -> Index | None:
        """Read the index at `where`; None if there is none.

        DataError if it is damaged or of another version, PermissionError if it may not be read.
        """
        remedy = "delete the folder, or rebuild the index with --rebuild"
        try:
            listing = json.loads((where / _LIST).read_bytes())
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise ValueError(f"{where} is a file; give a folder for the index") from None
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{where / _LIST} cannot be read ({error}); {remedy}") from None
        try:
            if (listing["format"], listing["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{listing['format']} version {listing['version']} instead of {FORMAT} {VERSION}")
            entries = [Entry(*values) for values in listing["files"]]
            embeddings = read_tensors(where / _plain_name(listing["embeddings"]))["embeddings"]
            return cls(folder, where, IndexOrigin(**listing["model"]), entries, embeddings)
        except PermissionError:
            raise
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DataError(f"{where} is damaged ({type(error).__name__}: {error}); {remedy}") from None

    def write(self) -> None:
        """Write the index; the old one stays until the new one is complete. files.WriteError if the disk is full."""
        self.where.mkdir(parents=True, exist_ok=True)
        old = _embeddings_of(self.where)
        listing: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": asdict(self.origin)}
        listed = [list(asdict(entry).values()) for entry in self.entries]
        name = f"embeddings-{hashlib.sha256(json.dumps([listing, listed]).encode()).hexdigest()[:16]}.safetensors"
        # In a folder of its own, as safetensors creates a temporary file next to the one it writes.
        unfinished = files.partial(self.where / name)
        try:
            with files.explain_write(self.where / name, self.embeddings.numel() * 4):
                unfinished.mkdir()
                with files.ordinary_mode(unfinished / name):
                    write_tensors(unfinished / name, {"embeddings": self.embeddings})
                files.checkpoint_event("before rename", self.where / name)
                os.replace(unfinished / name, self.where / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        files.checkpoint_event("after rename", self.where / name)
        rows = ",\n".join(map(json.dumps, listed))
        head = json.dumps(listing | {"embeddings": name})[:-1]
        files.replace_file(self.where / _LIST, f'{head}, "files": [\n{rows}\n]}}\n'.encode())
        self._sweep({old} - {name}, name)

    def _sweep(self, old: set[str | None], current: str) -> None:
        """Remove embeddings that are no longer listed; recent ones may be about to be listed by another process."""
        for path in self.where.glob("embeddings-*.safetensors"):
            with contextlib.suppress(OSError):
                abandoned = path.name != current and path.stat().st_mtime < time.time() - _UNLISTED_SECONDS
                if _NAME.fullmatch(path.name) and (abandoned or path.name in old):
                    path.unlink()

    # Building -----------------------------------------------------------------------------------------------------

    def stale(self, paths: Sequence[str]) -> list[str]:
        """Images that are new or changed on disk, by size and modification time."""
        known = {entry.path: (entry.size, entry.mtime_ns) for entry in self.entries}
        return [path for path in paths if known.get(_within(path, self.folder)) != (_stat(path) or _GONE)]

    def is_current(self, paths: Sequence[str]) -> bool:
        """Whether the index on disk is that of exactly `paths` as they are now, so that it need not be written."""
        names = [_within(path, self.folder) for path in paths]
        on_disk = (self.where / _LIST).exists()
        return on_disk and [entry.path for entry in self.entries] == names and not self.stale(paths)

    def writable(self, paths: Sequence[str]) -> Index:
        """Return the index for `updated`: itself, or if it has to be written and cannot, the one in the user's cache.

        That begins with what is known in the folder. ValueError, with the remedy, if no place can be written.
        """
        if self.is_current(paths) or _can_write(self.where):
            return self
        remedy = "give --index DIR to keep it elsewhere"
        cache = cache_place(self.folder, self.origin)
        if self.where != own_place(self.folder):
            raise ValueError(f"the index {self.where} cannot be written: {remedy}")
        if cache is None or not _can_write(cache):
            neither = self.where if cache is None else f"{self.where} nor {cache}"
            raise ValueError(f"the index can be written neither to {neither}: {remedy}")
        moved = None
        with contextlib.suppress(DataError):  # it is only a cache
            moved = Index.read(self.folder, cache)
        if moved is None or not moved.origin.same(self.origin):
            moved = dataclasses.replace(self, where=cache)
        print(f"note: {self.where} cannot be written; the index is in {cache}, or give --index DIR", file=sys.stderr)
        return moved

    def updated(
        self,
        paths: Sequence[str],
        stale: Sequence[str],
        model: Loaded,
        on_batch: Callable[[list[ImageFile]], None] = lambda batch: None,
    ) -> Index:
        """Build the index of exactly `paths`, reading the `stale` ones again; it is on disk on return.

        A file whose bytes are indexed already, under any name, is not embedded again. `on_batch` is called with each
        batch read.
        """
        vectors = dict(zip((entry.path for entry in self.readable), self.embeddings, strict=True))
        by_bytes = {entry.sha256: vectors[entry.path] for entry in self.readable}
        again = {_within(path, self.folder) for path in stale}
        entries = {entry.path: entry for entry in self.entries if entry.path not in again}
        saved = time.monotonic()
        try:
            for before, batch in _read_batches(stale, model):
                fresh = {p.digest: p for p in batch if not p.reason and p.digest not in by_bytes}
                if fresh:
                    images = torch.stack([image.pixels for image in fresh.values()])
                    by_bytes |= zip(fresh, model.embed_image(images).cpu(), strict=True)
                for image in batch:
                    name = _within(image.path, self.folder)
                    entries[name] = Entry(name, *(before[image.path] or _GONE), image.digest, image.reason)
                    if not image.reason:
                        vectors[name] = by_bytes[image.digest]
                on_batch(batch)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._of(paths, entries, vectors, model).write()
                    saved = time.monotonic()
        finally:
            index = self._of(paths, entries, vectors, model)
            if index.entries != self.entries or not (self.where / _LIST).exists():
                index.write()
        return index

    def _of(self, paths: Sequence[str], entries: dict[str, Entry], vectors: dict[str, Tensor], like: Loaded) -> Index:
        listed = [entries[name] for path in paths if (name := _within(path, self.folder)) in entries]
        rows = [vectors[entry.path] for entry in listed if not entry.reason]
        embeddings = torch.stack(rows) if rows else torch.empty(0, like.model.config.embed_dim)
        return Index(self.folder, self.where, self.origin, listed, embeddings)


def own_place(folder: Path) -> Path:
    """The folder of a folder's index if no other is chosen."""
    return folder / ".blip-index"


def cache_place(folder: Path, origin: IndexOrigin) -> Path | None:
    """The folder of a read-only folder's index, in the user's cache: one for each folder and model.

    None if the user has no home.
    """
    cache = files.cache_folder()
    real = os.path.realpath(folder)
    key = hashlib.sha256(os.fsencode(f"{real}\0{origin.weights}\0{origin.precision}")).hexdigest()[:16]
    return cache / "index" / key if cache else None


def up_to_date(
    folder: Path,
    inputs: InputImages,
    model: Loaded,
    name: str | None,
    *,
    where: str | None = None,
    rebuild: bool = False,
) -> tuple[Index, int]:
    """Update a folder's index, in `where` or else in the folder; returns it and the number of unusable images.

    `name` is the model's as given, if it was. Progress goes to stderr. ValueError, with the remedy, for an index of
    another model, or one that cannot be written.
    """
    precision = str(model.precision).removeprefix("torch.")
    origin = IndexOrigin.of(model, name or os.environ.get(MODEL_VARIABLE, ""), precision)
    place = Path(where) if where else own_place(folder)
    index = None if rebuild else _readable(folder, place, origin, is_chosen=where is not None)
    index = (index or Index(folder, place, origin)).writable(inputs.paths)
    if rebuild and index.entries:
        index = Index(folder, index.where, origin)
    stale = index.stale(inputs.paths)
    with Answers(None, inputs._replace(paths=stale)) as answers:

        def report(images: list[ImageFile]) -> None:
            answers.readable(images)
            answers.advance(len(images))

        try:
            index = index.updated(inputs.paths, stale, model, report)
        except files.WriteError as error:
            raise OSError(f"{error}; --index DIR keeps the index elsewhere") from None
    return index, answers.failed


def _readable(folder: Path, place: Path, origin: IndexOrigin, *, is_chosen: bool) -> Index | None:
    """Read the index at `place`; None if there is none, or one in a read-only folder that cannot be used.

    ValueError if it was built with another model.
    """
    try:
        index = Index.read(folder, place)
    except (DataError, PermissionError):
        if is_chosen or _can_write(place):
            raise
        return None
    if index is None or index.origin.same(origin):
        return index
    if not is_chosen and not _can_write(place):
        return None
    raise ValueError(
        f"{place} was built with {index.origin}, but this is {origin}: search with that model and precision, give "
        "another --index DIR, or --rebuild"
    )


def _can_write(folder: Path) -> bool:
    """Whether a file can be made in a folder, which is made if it is not there. Only trying tells on every disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = files.partial(folder / _LIST)
        trial.touch()
        trial.unlink()
    except OSError:
        return False
    return True


def _read_batches(
    paths: Sequence[str], model: Loaded
) -> Iterator[tuple[dict[str, tuple[int, int] | None], list[ImageFile]]]:
    """Yield batches of images with the files' sizes and times from before they were read."""
    size = 64 * model.batch
    for start in range(0, len(paths), size):
        part = paths[start : start + size]
        before = {path: _stat(path) for path in part}
        for batch in read_images(part, model.transform, model.batch):
            yield before, batch


def _embeddings_of(where: Path) -> str | None:
    """Name of the embeddings file that the index on disk lists."""
    try:
        return _plain_name(json.loads((where / _LIST).read_bytes())["embeddings"])
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain_name(name: str) -> str:
    """Check that a name stays in the folder: an index may come from an untrusted source."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an embeddings file")
    return name


def _within(path: str, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _stat(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
