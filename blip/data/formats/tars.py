"""Tar shards by index: headers are read once, members are never extracted, and only regular files are accepted."""

from __future__ import annotations

import functools
import json
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blip.data.formats.remote import RemoteFile, Unreachable
from blip.data.formats.rows import Columns, StoredRow
from blip.data.formats.values import captions_of, encodable
from blip.data.image_header import MAX_BYTES
from blip.errors import BadSample, DataError

if TYPE_CHECKING:
    from blip.data.formats.parquet import RowGroups

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "heic", "heif", "tif", "tiff"})
"""Endings of the names of images, wherever files are listed."""
TEXTS = frozenset({"txt", "caption"})
TEXT_COLUMN = "caption"
"""Column that a text member provides; other columns are in the JSON member."""
EXPECTED = "NAME.jpg (or .png, .webp, .gif, .bmp, .avif, .heic, .tif) with NAME.txt, NAME.caption or NAME.json"
"""Naming of a sample's members, for messages."""
MAX_EXTENDED = 64 << 10
"""Most bytes of extended headers of one member; names and times take some hundred."""
MAX_PADDING = 1 << 20
"""Most bytes of zeros after the last member."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = tarfile.BLOCKSIZE
_RECORD = tarfile.RECORDSIZE
"""Bytes to multiples of which tar pads its files: 10,240."""
_PAX = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE})
_EXTENDED = _PAX | {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_TAIL, _NO_TAIL = 8, frozenset({"jpg", "jpeg", "png", "webp", "gif", "json"}) | TEXTS
"""Number of zeros with which no member of these extensions ends; a black BMP or TIFF and other files may."""
_DIGITS = len(f"{MAX_EXTENDED} ")
_APART = 1 << 16
"""Most bytes between two members that are read together from a remote shard."""
_FEW = 20
"""A shard gets a note if fewer than one in this many samples is complete."""
_MOST_SUFFIXES, _MOST_NAMED, _SHOWN = 32, 5, 80
"""Most extensions that are counted, most that a message lists, and most characters shown of a name."""
_MAC = "__MACOSX"
EXPORTED = {"by": "capfilt"}
"""First of the `facts` in the JSON members of CapFilt's exports, in which `captions` count and not only the first."""
_EXPORTED = json.dumps(EXPORTED)[:-1]
_MOST_JSON = 1 << 20
"""Most bytes of a JSON member that is read to find out who wrote a shard."""


class Member(NamedTuple):
    """Byte range of a member in its shard; size -1 for a member that does not exist."""

    offset: int
    size: int


ReadMember = Callable[[Member], bytes]
_NONE = Member(0, -1)
_IN_TEXT = Columns("", None)
"""Columns of a sample whose caption is not in a column."""
SLOTS = ("image", "text", "json")
"""The members that a sample may have."""


@dataclass(slots=True)
class TarSample:
    """The members of one key, which is the name without extension; a second sample of the same name is KEY#2."""

    key: str
    image: Member = _NONE
    text: Member = _NONE
    """Member with extension txt or caption."""
    json: Member = _NONE

    def caption(self, column: str) -> Member:
        """Member that holds the caption: the text, or the JSON if there is no text or another column is wanted."""
        return self.json if self.text is _NONE or column != TEXT_COLUMN else self.text

    @property
    def whole(self) -> bool:
        """Whether there is an image and a member that may hold a caption."""
        return self.image is not _NONE and not (self.text is _NONE and self.json is _NONE)

    @property
    def owner(self) -> str:
        """The key up to the first dot: the sample that these members may belong to, if they are incomplete."""
        name = PurePosixPath(self.key)
        return str(name.parent / name.name.split(".")[0])


@dataclass(frozen=True)
class Headers:
    """Contents of a shard's headers."""

    samples: list[TarSample]
    """Samples in the order of their first member, wherever in the file the others are."""
    twice: list[str]
    """Keys that occur more than once."""
    damage: str | None
    """Damage of the file with the byte where it begins; `samples` are those before it."""
    notes: list[str]
    """Notes for the user: members left out, names that occur twice, joined archives."""
    members: str
    """Naming of the members, for messages."""
    exported: bool
    """Whether the shard is one of CapFilt's exports, by its first and last JSON members."""


# Headers --------------------------------------------------------------------------------------------------------------


class _Damage(Exception):
    """Damage of a tar file, with its position."""


def read_headers(file: IO[bytes], path: str | Path) -> Headers:
    """Read all headers of an open shard, including joined archives; `path` names it in errors.

    DataError for files that are not allowed at all: compressed files, links, devices, names that lead outside.
    """
    start, size = file.read(8), file.seek(0, os.SEEK_END)
    if start.startswith(_COMPRESSED):
        raise DataError(f"{path} is compressed, so single samples cannot be accessed: unpack it to a plain .tar")
    if size == 0:
        return Headers([], [], "the file is empty (0 bytes)", [], "", False)
    walk, grouped, damage = _Walk(file, size), _Grouped(), None
    try:
        for member in walk.members():
            _check(member, path)
            grouped.add(member)
    except _Damage as error:
        damage = str(error)
    grouped.finish()
    notes, exported = [*walk.notes(), *grouped.notes()], _is_export(file, grouped.samples)
    return Headers(grouped.samples, grouped.twice(), damage, notes, grouped.members(), exported)


def _headers_of(path: Path | RemoteFile) -> Headers:
    """The headers of a file, of a remote one those kept since it was first read."""
    if isinstance(path, Path):
        with path.open("rb") as file:
            return read_headers(file, path)

    def read() -> bytes:
        with path.open("rb") as file:
            headers = read_headers(file, path)
        samples = [(s.key, s.image, s.text, s.json) for s in headers.samples]
        return json.dumps(
            (samples, headers.twice, headers.damage, headers.notes, headers.members, headers.exported)
        ).encode()

    def parse(content: bytes) -> Headers:
        samples, *others = json.loads(content)
        slots = [(key, [_NONE if m == [*_NONE] else Member(*m) for m in spans]) for key, *spans in samples]
        return Headers([TarSample(key, *spans) for key, spans in slots], *others)

    return path.cached("tar.json", read, parse)


def _check(member: tarfile.TarInfo, path: str | Path) -> None:
    if member.name.startswith("/") or (".." in member.name and ".." in PurePosixPath(member.name).parts):
        raise DataError(f"{path}: member {member.name!r} points outside the archive; such a file is not used")
    if not member.isreg() or member.type == tarfile.GNUTYPE_SPARSE:
        raise DataError(f"{path}: member {member.name!r} is a link or device, or has holes; only plain files are read")


def _blocks(size: int) -> int:
    """A size rounded up to whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


class _Walk:
    """Walk from header to header through all archives of a file; contents are skipped.

    tarfile decodes single headers. It does not walk, because it takes the first block of zeros for the end of the
    file, calls itself for each extended header, and before Python 3.11.10 and 3.12.6 may take hours to parse one
    (CVE-2024-6232).
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self._archives, self._padding = 1, 0

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield all members but folders. Raises _Damage where the file is damaged."""
        at, began, last = 0, 0, None
        shared: dict[str, bytes] = {}  # what global headers say of all members after them
        while True:
            member = self._member(at, shared)
            if member is None:
                following = self._after(at, began, last)
                if following is None:
                    return
                at, began, last, shared = following, following, None, {}
                self._archives += 1
                continue
            at, last = member.offset_data, member
            if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                if at + member.size > self._size:
                    raise _Damage(
                        f"the file is cut off: member {_short(member.name)} of {member.size:,} bytes begins at byte "
                        f"{at:,}, and the file ends at byte {self._size:,}"
                    )
                at += _blocks(member.size)
            if not member.isdir():
                yield member

    def notes(self) -> list[str]:
        notes = [f"{self._archives} archives are joined in it, and all are read"] if self._archives > 1 else []
        if self._padding:
            notes.append(f"{self._padding:,} bytes of zeros follow the last member, more than most programs write: "
                         "if it was downloaded, compare its checksum")  # fmt: skip
        return notes

    def _member(self, begin: int, shared: dict[str, bytes]) -> tarfile.TarInfo | None:
        """The member whose header, or first extended header, is at a byte; None if there are zeros."""
        at, own = begin, {}
        while True:
            header = self._header(at)
            if header is None and at > begin:
                raise _Damage(f"the extended header at byte {begin:,} is followed by zeros instead of a member")
            if header is None:
                return None
            if header.size < 0:
                raise _Damage(f"the member at byte {at:,} has a negative size")
            at += _BLOCK
            if header.type not in _EXTENDED:
                return _applied(header, at, {**shared, **own})
            after = at + _blocks(header.size)
            if after - begin > MAX_EXTENDED:
                raise _Damage(
                    f"more than {MAX_EXTENDED >> 10} KB of extended headers before one member, at byte {begin:,}"
                )
            self._file.seek(at)
            content = self._file.read(header.size)
            if len(content) < header.size:
                raise _Damage(f"the file is cut off in the extended header at byte {at:,}")
            values = dict(_records(content, at)) if header.type in _PAX else {"path": content.split(b"\0", 1)[0]}
            if header.type == tarfile.XGLTYPE:
                shared.update(values)
            elif header.type != tarfile.GNUTYPE_LONGLINK:  # links are refused whatever they lead to
                own = {**values, **own}  # of several of one kind the first counts, as tarfile has it
            at = after

    def _header(self, at: int) -> tarfile.TarInfo | None:
        """The header at a byte, None for a block of zeros."""
        self._file.seek(at)
        block = self._file.read(_BLOCK)
        if not block:
            raise _Damage(f"the file ends at byte {self._size:,} without an end marker: it is cut off")
        if len(block) < _BLOCK:
            raise _Damage(f"the file is cut off in the header at byte {at:,}")
        if not block.strip(b"\0"):
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError):
            raise _Damage(f"the bytes at {at:,} are not a tar header") from None

    def _after(self, at: int, began: int, last: tarfile.TarInfo | None) -> int | None:
        """Start of the archive after the zeros at a byte; None if the file ends with them.

        One block of zeros where a header belongs is a header that was lost; two or more end an archive. They are
        believed unless there are more than any program writes, or they begin inside the last member.
        """
        end = self._end_of_zeros(at)
        zeros = f"zeros from byte {at:,} to {end:,}"
        if end - at > MAX_PADDING:
            raise _Damage(f"more than 1 MiB of zeros from byte {at:,} on: the file was not filled to its end")
        if end < self._size:
            try:
                self._header(end)
            except _Damage:
                raise _Damage(f"{zeros}, followed by bytes that are not a tar header") from None
            if end - at < 2 * _BLOCK:
                raise _Damage(f"{zeros} stand where a header belongs")
        # What tar writes: two blocks, or up to a whole record of the archive that ends.
        if end <= began + -(-(at + 2 * _BLOCK - began) // _RECORD) * _RECORD:
            return end if end < self._size else None
        if at == 0:
            raise _Damage(f"{zeros}, before any member")
        if last and last.isreg() and last.size and last.name.rpartition(".")[2].lower() in _NO_TAIL:
            tail = min(last.size, _TAIL)
            self._file.seek(last.offset_data + last.size - tail)
            if not self._file.read(tail).strip(b"\0"):
                raise _Damage(f"{zeros}, which begin inside the last member: the file was not filled to its end")
        if end == self._size:
            self._padding = end - at
        return end if end < self._size else None

    def _end_of_zeros(self, at: int) -> int:
        """The first block after zeros, the end of the file, or some byte too far away for padding."""
        step = _RECORD
        self._file.seek(at)
        end = at
        while end - at <= MAX_PADDING:
            chunk = self._file.read(step)
            rest = len(chunk.lstrip(b"\0"))
            if rest:
                return end + (len(chunk) - rest) // _BLOCK * _BLOCK
            end += len(chunk)
            if len(chunk) < step:
                break
            step = min(2 * step, MAX_PADDING)
        return end


def _applied(header: tarfile.TarInfo, at: int, extended: dict[str, bytes]) -> tarfile.TarInfo:
    """A member with what its extended headers say of it, whose content begins at a byte."""
    header.offset_data = at
    if name := extended.get("path"):
        header.name = name.decode("utf-8", "surrogateescape")
    if size := extended.get("size"):
        if not size.isdigit() or len(size) > 20:
            raise _Damage(
                f"member {_short(header.name)} before byte {at:,} has the size {_short(size.decode('latin-1'))}"
            )
        header.size = int(size)
    if "holes" in extended:
        header.type = tarfile.GNUTYPE_SPARSE
    return header


def _records(content: bytes, at: int) -> Iterator[tuple[str, bytes]]:
    """The records `LENGTH KEYWORD=VALUE\\n` of a PAX header that change what is read: path, size, holes."""
    start = 0
    while start < len(content):
        digits, space, _ = content[start : start + _DIGITS].partition(b" ")
        end = start + (int(digits) if space and digits.isdigit() else 0)
        keyword, equals, value = content[start + len(digits) + 1 : end].partition(b"=")
        if end > len(content) or not equals or value[-1:] != b"\n":
            raise _Damage(f"the extended header at byte {at:,} is damaged")
        if keyword in (b"path", b"size"):
            yield keyword.decode(), value[:-1]
        elif keyword.startswith(b"GNU.sparse."):
            yield "holes", b""
        start = end


# Samples --------------------------------------------------------------------------------------------------------------


def _short(name: str) -> str:
    """A name for a message, however long it is."""
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")


def _field(stem: str) -> tuple[str, str]:
    """`a/b.input` -> (`a/b`, `input`): what stands before and behind the last dot, if that is a word."""
    owner, _, word = stem.rpartition(".")
    return (owner, word) if owner and word.replace("-", "_").isidentifier() and not owner.endswith("/") else (stem, "")


class _Grouped:
    """Samples by key. The ending is what follows the last dot, as names of images have dots of their own."""

    def __init__(self) -> None:
        self.samples: list[TarSample] = []
        self._stems: list[str] = []  # of the samples: their keys without a copy's number
        self._copies: dict[str, int] = {}
        self._latest: dict[str, TarSample] = {}
        self._suffixes: dict[str, tuple[str, int]] = {}  # the first name of each, and how many there are
        self._hidden, self._fields = ("", 0), False

    def add(self, member: tarfile.TarInfo) -> None:
        name = member.name
        if "/" in name or name.startswith(".") or name == _MAC:
            path = PurePosixPath(name)
            if any(part.startswith(".") or part == _MAC for part in path.parts):  # as in folders
                self._hidden = self._hidden[0] or name, self._hidden[1] + 1
                return
            name = str(path)
        stem, dot, suffix = name.rpartition(".")
        if not dot or "/" in suffix:
            return
        suffix = suffix.lower()
        if suffix in self._suffixes or len(self._suffixes) < _MOST_SUFFIXES:
            first, count = self._suffixes.get(suffix, (name, 0))
            self._suffixes[suffix] = first, count + 1
        slot = "image" if suffix in IMAGES else "text" if suffix in TEXTS else "json" if suffix == "json" else None
        if slot is not None:
            stem = stem.encode("utf-8", "backslashreplace").decode()
            self._put(stem, slot, Member(member.offset_data, member.size))

    def _put(self, stem: str, slot: str, member: Member) -> None:
        sample = self._latest.get(stem)
        if sample is None or getattr(sample, slot) is not _NONE:
            copy = self._copies[stem] = self._copies.get(stem, 0) + 1
            sample = self._latest[stem] = TarSample(stem if copy == 1 else f"{stem}#{copy}")
            self.samples.append(sample)
            self._stems.append(stem)
        setattr(sample, slot, member)

    def _halves(self) -> Iterator[tuple[str, str, Member]]:
        """The (stem, slot, member) of all samples."""
        for sample, stem in zip(self.samples, self._stems, strict=True):
            for slot in SLOTS:
                if (member := getattr(sample, slot)) is not _NONE:
                    yield stem, slot, member

    def finish(self) -> None:
        """Put fields that have names of their own together where there is one way to do it.

        That is, where no sample is whole, and all images of the shard have one field name or none, and so all texts
        and all JSON (`1.input.jpg` and `1.output.txt`); or where texts are named after the file of their image
        (`1.jpg` and `1.jpg.txt`).
        """
        if any(sample.whole for sample in self.samples):
            return
        words: dict[str, set[str]] = {"image": set()}
        for stem, slot, _ in self._halves():
            words.setdefault(slot, set()).add(_field(stem)[1])
        if len(words) < 2:
            return
        files = {slot for slot, of_slot in words.items() if {word.lower() for word in of_slot} <= IMAGES} - {"image"}
        if files:
            words.pop("image")
        if not all(len(of_slot) == 1 for slot, of_slot in words.items() if slot not in files):
            return
        joined = _Grouped()
        for stem, slot, member in self._halves():
            joined._put(_field(stem)[0] if slot in words else stem, slot, member)
        if any(sample.whole for sample in joined.samples):
            self.samples, self._copies, self._fields = joined.samples, joined._copies, True

    def twice(self) -> list[str]:
        """Keys that occur more than once."""
        return [key for key, n in self._copies.items() if n > 1]

    def notes(self) -> list[str]:
        notes, copies = [], self.twice()
        images = sum(sample.image is not _NONE for sample in self.samples)
        whole = sum(sample.whole for sample in self.samples)
        others = sum(count for suffix, (_, count) in self._suffixes.items() if suffix not in IMAGES)
        if whole * _FEW < min(images, others):
            notes.append(f"{whole} of {len(self.samples)} samples have an image and a text: {self.members()}")
        if self._fields:
            first = [
                next(n for e, (n, _) in self._suffixes.items() if (e in IMAGES) == image) for image in (True, False)
            ]
            notes.append(
                f"fields with names of their own are taken as one sample, as {' and '.join(map(_short, first))}"
            )
        if copies:
            notes.append(f"{len(copies)} {'keys occur' if len(copies) > 1 else 'key occurs'} more than once, "
                         f"e.g. {_short(copies[0])}; the later ones are called KEY#2 and so on")  # fmt: skip
        if self._hidden[1]:
            name, count = self._hidden
            are = "members" if count > 1 else "member"
            notes.append(f"left out {count} hidden {are} (._NAME, .NAME, __MACOSX/), e.g. {_short(name)}")
        return notes

    def members(self) -> str:
        """How members are named, and how they should be."""
        ranked = sorted(self._suffixes.items(), key=lambda one: -one[1][1])
        named = [f"{count} like {_short(first)}" for _, (first, count) in ranked[:_MOST_NAMED]]
        if self._hidden[1]:
            named.append(f"{self._hidden[1]} hidden ones like {_short(self._hidden[0])}")
        return f"its members are {', '.join(named)}; expected {EXPECTED}" if named else "it has no members"


class Shard:
    """The samples of one tar file that training can use: an image with a caption, or what lacks one of them.

    A half sample beside a whole one (`7.seg.png` beside `7.jpg` and `7.txt`) is something else about that: left out.
    """

    def __init__(self, path: Path | RemoteFile, column: str = TEXT_COLUMN, *, allow_truncated: bool = False):
        """Read all headers; captions are of `column`.

        Raises DataError for what is no tar, is compressed, cut off, or has links or odd names.
        """
        self.path = path
        self.names: list[str] = []
        self._spans = array("q")  # image offset, size, caption offset, size
        self._json = bytearray()
        try:
            headers = _headers_of(path)
        except OSError as e:
            raise DataError(f"{self.path} cannot be read: {e.strerror}") from None
        if headers.damage and (not headers.samples or not allow_truncated):
            raise DataError(
                f"{self.path} is not a whole tar file ({headers.damage}) after {len(headers.samples)} samples: "
                "copy it again, or set allow_truncated to use the readable part"
            )

        def caption_of(sample: TarSample) -> Member:
            return (
                sample.json
                if headers.exported and column == TEXT_COLUMN and sample.json is not _NONE
                else sample.caption(column)
            )

        whole = {sample.key for sample in headers.samples if _NONE not in (sample.image, caption_of(sample))}
        for sample in headers.samples:
            if sample.key in whole or sample.owner not in whole:
                caption = caption_of(sample)
                self.names.append(sample.key)
                self._spans.extend((*sample.image, *caption))
                self._json.append(caption is not sample.text)
        notes = [f"not whole ({headers.damage}): its first {len(self)} samples are used"] if headers.damage else []
        images, captions = (int((self.spans()[:, column] >= 0).sum()) for column in (1, 3))
        self.summary = Summary(path, len(whole), images, captions, headers.members, notes + headers.notes)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> Member:
        return Member(self._spans[4 * i], self._spans[4 * i + 1])

    def caption(self, i: int) -> tuple[Member, bool]:
        """Member that holds the caption, and whether it is a JSON member."""
        return Member(self._spans[4 * i + 2], self._spans[4 * i + 3]), bool(self._json[i])

    def spans(self) -> np.ndarray:
        """(samples, 4) int64: image offset and size, caption offset and size."""
        return np.array(self._spans, dtype=np.int64).reshape(-1, 4)

    def is_json(self) -> np.ndarray:
        """(samples,) bool: whether the caption is in a JSON member."""
        return np.array(self._json, dtype=bool)


class Summary(NamedTuple):
    """Summary of an opened shard, for messages."""

    path: Path | RemoteFile
    whole: int
    """Samples that have both an image and a member for the caption."""
    images: int
    captions: int
    members: str
    """How the members are named, for messages."""
    notes: list[str]


def check_whole(where: str, shards: Sequence[Summary]) -> None:
    """DataError if no sample of some shards has both an image and a caption; it names the members there are."""
    if any(shard.whole for shard in shards):
        return
    counts = {"an image": sum(s.images for s in shards), "a caption": sum(s.captions for s in shards)}
    lacks = " or ".join(what for what, count in counts.items() if not count)
    members = next((f": {s.path.name}: {s.members}" for s in shards if s.members), "")
    raise DataError(f"{where}: no sample has {f'{lacks} member' if lacks else 'both an image and a caption'}{members}")


def sample_row(
    number: int,
    key: str,
    image: Member | None,
    text: Member | None,
    json: Member | None,
    columns: Columns,
    read: ReadMember,
) -> StoredRow:
    """The row of a sample whose members `read` gives, which may raise BadSample.

    Its caption is the text, or the JSON member's where there is no text or another column is asked for; a JSON member
    that is no object is the caption itself, where no other column is asked for. CapFilt's exports have all captions in
    the JSON, the first also as text.
    """
    column = columns.caption
    in_text = text is not None and column == TEXT_COLUMN
    content: bytes | BadSample | None = None
    captions: list[str] | BadSample | None = [] if column is None else None
    values: dict[str, Any] = {}
    try:
        if json is not None:
            captions, values = _json(_whole(json, read), None if in_text else column)
        if column == TEXT_COLUMN and (exported := _exported_captions(values)):
            captions = exported
        elif in_text:
            captions = [_whole(text, read).decode("utf-8", "replace")]
        if image is not None:
            content = _whole(image, read)
    except BadSample as error:
        content = error
    if content is None:
        content = BadSample("no image member", "no_image")
    if captions is None:
        captions = BadSample("no caption member", "no_caption")
    return StoredRow(number, key, content, captions, values, _IN_TEXT if in_text else columns)


def _whole(member: Member, read: ReadMember) -> bytes:
    if member.size > MAX_BYTES:
        raise BadSample(f"{member.size:,} bytes, more than the limit of {MAX_BYTES:,}", "too_many_bytes")
    return read(member)


def _json(content: bytes, column: str | None) -> tuple[list[str] | BadSample, dict[str, Any]]:
    """The captions that a JSON member holds in a column, or why it holds none; and all its columns.

    None are looked for in no column. A member that is no object stands under `json` as it is.
    """
    text = content.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        fault = [] if column is None else BadSample(f"its .json member is not valid JSON: {error}", "no_caption")
        return fault, {"json": encodable(text)}
    values = value if isinstance(value, dict) else {"json": value}
    if column is None:
        return [], values
    try:
        if not isinstance(value, dict) and column == TEXT_COLUMN:
            return captions_of(value), values
        if column in values:
            return captions_of(values[column]), values
        if not isinstance(value, dict):
            fault = f"no caption: its .json member is a text or a list, without {column!r}"
            return BadSample(fault, "no_caption"), values
        have = ", ".join(sorted(value))[:200] or "nothing"
        return BadSample(f"no caption: its .json member has no {column!r} (it has: {have})", "no_caption"), values
    except BadSample as error:
        return error, values


def is_exported(values: dict[str, Any]) -> bool:
    """Whether a JSON member with these columns is one of CapFilt's exports."""
    facts = values.get("facts")
    return isinstance(facts, str) and facts.startswith(_EXPORTED)


def _exported_captions(values: dict[str, Any]) -> list[str]:
    """The captions of a sample of CapFilt's exports; none of any other."""
    if not is_exported(values):
        return []
    try:
        return captions_of(values.get("captions"))
    except BadSample:
        return []


def _is_export(file: IO[bytes], samples: Sequence[TarSample]) -> bool:
    """Whether an open shard is one of CapFilt's exports, by its first and last JSON members."""
    members = [sample.json for sample in samples if sample.json is not _NONE]
    for member in {members[0], members[-1]} if members else ():
        if member.size > _MOST_JSON:
            return False
        file.seek(member.offset)
        if not is_exported(json_columns(file.read(member.size))):
            return False
    return bool(members)


def json_columns(content: bytes) -> dict[str, Any]:
    """The columns of a JSON member."""
    return _json(content, None)[1]


class Tar:
    """The samples of one shard by an index of where their members are."""

    def __init__(
        self,
        index: RowGroups,
        column: str | None,
        reading: Callable[[Sequence[Member]], AbstractContextManager[ReadMember]],
    ):
        """`reading` opens the shard for as long as these members are read."""
        self.index, self.columns, self.reading = index, Columns("", column), reading

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, lo: int, hi: int) -> Iterator[StoredRow]:
        entries = list(self.index.values(lo, hi))
        spans = [[entry["image"], entry["text"], entry["json"]] for entry in entries]
        samples = [[span and Member(span["at"], span["size"]) for span in some] for some in spans]
        with self.reading([member for sample in samples for member in sample if member]) as read:
            for number, entry, sample in zip(range(lo, hi), entries, samples, strict=True):
                yield sample_row(number, entry["key"], *sample, self.columns, read)


def read_member(shard: Path, member: Member) -> bytes:
    """The bytes of a member. Raises BadSample if the file has become shorter than its headers say."""
    fd = os.open(shard, os.O_RDONLY)
    try:
        content = os.pread(fd, member.size, member.offset)
    finally:
        os.close(fd)
    if len(content) != member.size:
        raise BadSample(f"{shard} ends before byte {sum(member):,}: it has become shorter")
    return content


def members_of(shard: RemoteFile, *members: Member) -> ReadMember:
    """Read some members of one sample, neighbours in one request. They raise BadSample where they cannot be read."""
    known = [member for member in members if member.size >= 0]
    start, stop = min(m.offset for m in known), max(map(sum, known))
    near = stop - start <= sum(m.size for m in known) + _APART

    @functools.cache
    def together() -> bytes:
        return shard.read_range(start, stop - start)

    def read(member: Member) -> bytes:
        try:
            if near:
                at = member.offset - start
                return together()[at : at + member.size]
            return shard.read_range(*member)
        except Unreachable as error:
            raise BadSample(str(error)) from None

    return read


def in_sequence(shard: RemoteFile) -> ReadMember:
    """Read members of a shard one after another, ahead of their use. Raises DataError if the shard cannot be read."""
    file = shard.open("rb")

    def read(member: Member) -> bytes:
        file.seek(member.offset)
        return file.read(member.size)

    return read
