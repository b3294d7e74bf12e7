"""The header of HEIC and AVIF files (ISO base media files): codec, size, and the pixels that decoding them takes.

A decoder obeys a header whose derived images (grids, overlays) repeat their parts, so these are counted before it
starts. Neither says what AV1 frames inside may override: libavif then stops at 268 million pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from blip.errors import UnreadableImage

BRANDS = dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"), "HEIC")
BRANDS |= dict.fromkeys((b"avif", b"avis"), "AVIF")
"""Codec by brand of a file."""
_EITHER = (b"mif1", b"msf1")
"""Brands of any image or sequence; the compatible brands, or the image itself, name its codec."""
_CODED = {b"hvc1": "HEIC", b"av01": "AVIF"}
_DERIVED = (b"grid", b"iovl", b"iden")
_METADATA = (b"Exif", b"mime", b"uri ")
_MOST_BOXES, _MOST_BYTES, _MOST_UNITS = 100_000, 1 << 20, 10_000
"""Most boxes of a level, bytes of a table of items, and units of a coded image."""
_DEPTH = 8
"""Most derived images one inside another."""
_PIXELS, _TIMES = 1 << 24, 4
"""Pixels that parts may have beyond a multiple of the image's own: padding of tiles, alpha."""


class Header(NamedTuple):
    """What a header says of the first image."""

    codec: str
    """HEIC or AVIF."""
    width: int
    """Pixels as stored, before the image is set upright; 0 if the header has no size, as of a sequence."""
    height: int


def is_isobmff(data: bytes) -> bool:
    """Whether a file begins as HEIC or AVIF do."""
    return data[4:8] == b"ftyp" and (data[8:12] in BRANDS or data[8:12] in _EITHER)


def codec_of(data: bytes) -> str:
    """HEIC or AVIF, by the brands of a file; HEIF if only its items could tell."""
    size = min(int.from_bytes(data[:4], "big"), 4096)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))]
    return next((BRANDS[brand] for brand in brands if brand in BRANDS), "HEIF")


def read_header(data: bytes) -> tuple[Header, bytes]:
    """Check the header of a HEIC or AVIF; returns it, and the file without metadata, which is not read.

    An orientation in metadata does not count in these formats: their own rotation and mirroring do. Raises
    UnreadableImage for a file that is cut off, and for parts that take more than a few times the work of the image.
    """
    codec, items = codec_of(data), _Items()
    for kind, at, end in _boxes(data, 0, len(data)):
        if kind == b"meta":
            _read_meta(items, data, at + 4, end)
    if items.primary not in items.kinds:  # a sequence, or damage
        return Header(codec, 0, 0), data
    coded = {items.kinds[item] for item in items.decoded()} - set(_DERIVED)
    if foreign := coded - _CODED.keys():
        name = shown_kind(min(foreign))
        raise UnreadableImage("other_format", f"is a HEIF image coded as {name}; of these, HEVC and AV1 are decoded")
    codec = _CODED[min(coded)] if coded else codec
    width, height = items.size(items.primary, data)
    work = items.work(data)
    if work > _TIMES * width * height + _PIXELS:
        raise UnreadableImage(
            "too_much_work", f"too much work to decode: parts of {work:,} pixels for {width:,} x {height:,}"
        )
    return Header(codec, width, height), items.without_metadata(data)


def coded_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the first image of a HEIC or AVIF, with its padding; None for anything else."""
    header = read_header(data)[0] if is_isobmff(data) else None
    return (header.width, header.height) if header and header.width else None


def shown_kind(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace").strip()


def _damaged() -> UnreadableImage:
    return UnreadableImage("decoder_error", "has a damaged header")


class _Fields:
    """Numbers of a box, one after another."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def take(self, size: int) -> int:
        at, self.at = self.at, self.at + size
        if self.at > self.end:
            raise _damaged()
        return int.from_bytes(self.data[at : self.at], "big")


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the contents of the boxes from `at` to `end`."""
    parts = 0
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        begin = at + 8
        if size == 1:
            size, begin = int.from_bytes(data[begin : begin + 8], "big"), begin + 8
        elif size == 0:
            size = end - at
        parts += 1
        if parts > _MOST_BOXES:
            raise UnreadableImage("too_much_work", f"too much work to decode: more than {_MOST_BOXES:,} boxes")
        if at + size > end and end == len(data):
            reason = f"is cut off: it has {len(data):,} bytes, fewer than its header says"
            raise UnreadableImage("truncated", reason)
        if at + size < begin or at + size > end:
            raise _damaged()
        yield kind, begin, at + size
        at += size


@dataclass
class _Items:
    """The items of a file, by number."""

    primary: int = 0
    kinds: dict[int, bytes] = field(default_factory=dict)
    named_at: dict[int, int] = field(default_factory=dict)
    """Position of an item's kind in the file."""
    inputs: dict[int, list[int]] = field(default_factory=dict)
    """Items that a derived image is made of, repeated ones repeated."""
    alphas: dict[int, list[int]] = field(default_factory=dict)
    """Auxiliary images of an item, of which transparency is one."""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Byte ranges of an item in the file."""
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    """Width and height that a property gives; None for properties of other kinds."""
    properties: dict[int, list[int]] = field(default_factory=dict)
    _work: dict[int, int] = field(default_factory=dict)

    def decoded(self) -> set[int]:
        """Items that are decoded for the first image."""
        seen: set[int] = set()
        waiting = [self.primary]
        while waiting:
            item = waiting.pop()
            if item in seen or item not in self.kinds:
                continue
            seen.add(item)
            if self.kinds[item] in _DERIVED:
                waiting += self.inputs.get(item, ())
            waiting += self.alphas.get(item, ())
        return seen

    def size(self, item: int, data: bytes) -> tuple[int, int]:
        """The larger of the sizes that the header and the coded image give."""
        known = [self.sizes[i] for i in self.properties.get(item, ()) if i < len(self.sizes)]
        sizes = [size for size in known if size is not None]
        if self.kinds[item] == b"av01":
            sizes += _sequence_sizes(self._bytes(item, data))
        return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))

    def work(self, data: bytes) -> int:
        """Pixels that are decoded and put together for the first image."""
        return self._work_of(self.primary, data, 0)

    def _work_of(self, item: int, data: bytes, depth: int) -> int:
        if item not in self.kinds:
            return 0
        if depth > _DEPTH:
            raise UnreadableImage("too_much_work", f"too much work to decode: more than {_DEPTH} images inside another")
        if item not in self._work:
            width, height = self.size(item, data)
            parts = [*(self.inputs.get(item, ()) if self.kinds[item] in _DERIVED else ()), *self.alphas.get(item, ())]
            self._work[item] = width * height + sum(self._work_of(part, data, depth + 1) for part in parts)
        return self._work[item]

    def _bytes(self, item: int, data: bytes) -> bytes:
        ranges = self.extents.get(item, [])
        if sum(size for _, size in ranges) > len(data):
            raise _damaged()
        return b"".join(data[at : at + size] for at, size in ranges)

    def without_metadata(self, data: bytes) -> bytes:
        """The file with its metadata named as what no decoder reads."""
        hidden = [self.named_at[item] for item, kind in self.kinds.items() if kind in _METADATA]
        if not hidden:
            return data
        changed = bytearray(data)
        for at in hidden:
            changed[at : at + 4] = b"none"
        return bytes(changed)


def _read_meta(items: _Items, data: bytes, at: int, end: int) -> None:
    idat, located = 0, []
    for kind, begin, stop in _boxes(data, at, end):
        if kind in (b"iinf", b"iref", b"iloc"):
            _check_table(begin, stop)
        fields = _Fields(data, begin, stop)
        if kind == b"pitm":
            items.primary = fields.take(4 if fields.take(4) >> 24 else 2) if stop - begin >= 6 else 0
        elif kind == b"iinf":
            _read_names(items, data, begin, stop)
        elif kind == b"iref":
            _read_references(items, data, begin, stop)
        elif kind == b"iprp":
            _read_properties(items, data, begin, stop)
        elif kind == b"iloc":
            located = list(_locations(fields))
        elif kind == b"idat":
            idat = begin
    for item, inside, start, size in located:
        begin = start + (idat if inside else 0)
        if begin + size > len(data) and item in items.kinds and items.kinds[item] not in _METADATA:
            reason = f"is cut off: it has {len(data):,} bytes, fewer than its header says"
            raise UnreadableImage("truncated", reason)
        items.extents.setdefault(item, []).append((begin, size or len(data) - begin))


def _check_table(begin: int, stop: int) -> None:
    """Raise UnreadableImage for a table that would take long to read."""
    if stop - begin > _MOST_BYTES:
        raise UnreadableImage("too_much_work", f"too much work to decode: {stop - begin:,} bytes of header")


def _read_names(items: _Items, data: bytes, begin: int, stop: int) -> None:
    fields = _Fields(data, begin, stop)
    fields.take(4 if fields.take(4) >> 24 else 2)
    for kind, at, end in _boxes(data, fields.at, stop):
        fields = _Fields(data, at, end)
        version = fields.take(4) >> 24
        if kind == b"infe" and version >= 2:
            item, _, name = fields.take(2 if version == 2 else 4), fields.take(2), fields.take(4)
            items.kinds[item], items.named_at[item] = name.to_bytes(4, "big"), fields.at - 4


def _read_references(items: _Items, data: bytes, begin: int, stop: int) -> None:
    fields = _Fields(data, begin, stop)
    wide = 4 if fields.take(4) >> 24 else 2
    for kind, at, end in _boxes(data, fields.at, stop):
        fields = _Fields(data, at, end)
        item, count = fields.take(wide), fields.take(2)
        others = [fields.take(wide) for _ in range(count)]
        if kind == b"dimg":
            items.inputs.setdefault(item, []).extend(others)
        elif kind == b"auxl":
            for other in others:
                items.alphas.setdefault(other, []).append(item)


def _read_properties(items: _Items, data: bytes, begin: int, stop: int) -> None:
    for kind, at, end in _boxes(data, begin, stop):
        if kind == b"ipco":
            for name, start, last in _boxes(data, at, end):
                fields = _Fields(data, start + 4, last)
                items.sizes.append((fields.take(4), fields.take(4)) if name == b"ispe" else None)
        elif kind == b"ipma":
            _check_table(at, end)
            fields = _Fields(data, at, end)
            flags = fields.take(4)
            for _ in range(fields.take(4)):
                item = fields.take(4 if flags >> 24 else 2)
                size, last = (2, 0x7FFF) if flags & 1 else (1, 0x7F)
                numbers = [fields.take(size) & last for _ in range(fields.take(1))]
                items.properties.setdefault(item, []).extend(number - 1 for number in numbers if number)


def _locations(fields: _Fields) -> Iterator[tuple[int, bool, int, int]]:
    """Yield (item, whether in the box idat, start, size) of all extents."""
    version = fields.take(4) >> 24
    widths, more = fields.take(1), fields.take(1)
    offset, length, base, index = widths >> 4, widths & 15, more >> 4, (more & 15) * (version > 0)
    for _ in range(fields.take(4 if version == 2 else 2)):
        item = fields.take(4 if version == 2 else 2)
        inside = version > 0 and fields.take(2) & 15 == 1
        fields.take(2)
        start = fields.take(base)
        for _ in range(fields.take(2)):
            fields.take(index)
            yield item, inside, start + fields.take(offset), fields.take(length)


# AV1 ------------------------------------------------------------------------------------------------------------------


class _Bits:
    """Bits of a header, one after another; zeros beyond its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> int:
        begin, self.at = self.at, self.at + count
        first, last = begin // 8, (self.at + 7) // 8
        whole = int.from_bytes(self.data[first:last].ljust(last - first, b"\0"), "big")
        return whole >> (8 * last - self.at) & ((1 << count) - 1)


def _sequence_sizes(data: bytes) -> list[tuple[int, int]]:
    """The sizes in the sequence headers of a coded image, which need not be those of its box."""
    sizes, at, units = [], 0, 0
    while at < len(data):
        head, units = data[at], units + 1
        at += 1 + (head >> 2 & 1)
        if units > _MOST_UNITS:
            raise UnreadableImage("too_much_work", f"too much work to decode: more than {_MOST_UNITS:,} units")
        size, shift = 0, 0
        while head & 2 and at < len(data) and shift < 56:
            size |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                break
        size = size if head & 2 else len(data) - at
        if head >> 3 & 15 == 1:
            sizes.append(_sequence_size(_Bits(data[at : at + min(size, 1024)])))
        at += size
    return sizes


def _sequence_size(bits: _Bits) -> tuple[int, int]:
    """Largest width and height by a sequence header (AV1 specification, section 5.5.1)."""
    bits.take(4)
    if bits.take(1):  # of a still image, reduced
        bits.take(5)
    else:
        _skip_timing(bits)
    across, down = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(across) + 1, bits.take(down) + 1


def _skip_timing(bits: _Bits) -> None:
    delay = 0
    if bits.take(1):
        bits.take(64)
        if bits.take(1):
            zeros = 0
            while zeros < 32 and not bits.take(1):
                zeros += 1
            bits.take(zeros)
        if bits.take(1):
            delay = bits.take(5) + 1
            bits.take(42)
    displayed = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delay and bits.take(1):
            bits.take(2 * delay + 1)
        if displayed and bits.take(1):
            bits.take(4)
