"""The header of a TIFF's first page: check what decoding it takes, and leave out what does not decide its pixels."""

from __future__ import annotations

import struct
from typing import NamedTuple

from blip.errors import UnreadableImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ENTRIES, _MOST_BLOCKS, _MOST_PAGES = 1_000, 200_000, 10_000
"""Most entries of a page's header, strips or tiles of a page, and pages that are counted."""
_MOST_CHANNELS = 6
_BLOCK_BYTES = 64 << 20
"""Bytes that a strip or tile may have beyond the image's own."""
_SCANNED = 4_000_000_000
"""Pixels times scans of JPEG strips."""
_WHOLE = frozenset({1, 3, 4, 13, 16, 18})
"""Types of whole numbers."""
_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value, by type."""
_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _CHANNELS = 256, 257, 258, 259, 262, 273, 277
_ROWS, _STRIP_BYTES, _TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES, _SAMPLE = 278, 279, 322, 323, 324, 325, 339
_KEPT = frozenset(
    {254, 255, *range(256, 260), 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 332}
    | {338, 339, 347, *range(529, 533)}
)
"""Tags that decide the pixels, orientation included; all others are renamed."""
_UNUSED = 65_000
_JPEG = 7
_COMPRESSIONS = {1, 2, 3, 4, 5, _JPEG, 8, 32_773, 32_946}
"""None, fax, LZW, JPEG, deflate and PackBits; others are rare and their decoders take any memory or are not there."""


class _Order(NamedTuple):
    """How numbers are stored in a file."""

    sign: str
    big: bool

    def number(self, data: bytes, at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little" if self.sign == "<" else "big")

    @property
    def step(self) -> int:
        """Bytes of an entry."""
        return 20 if self.big else 12

    @property
    def wide(self) -> int:
        """Bytes of an offset."""
        return 8 if self.big else 4

    def entries(self, data: bytes, at: int) -> tuple[int, int]:
        """Number of entries of a page, and where they begin."""
        counted = 8 if self.big else 2
        return self.number(data, at, counted), at + counted


def _order(data: bytes) -> tuple[_Order, int]:
    """How numbers are stored, and where the first page is."""
    order = _Order("<" if data.startswith(b"II") else ">", data[2:4] in (b"+\0", b"\0+"))
    return order, order.number(data, 8 if order.big else 4, order.wide)


def first_page(data: bytes) -> bytes:
    """The file with its first page only and without metadata. Raises UnreadableImage if decoding it takes too much."""
    order, page = _order(data)
    count, start = order.entries(data, page)
    if page < 8:
        raise UnreadableImage("not_an_image", "is a TIFF image without a page")
    if page < len(data) and count > _ENTRIES:
        raise UnreadableImage("too_much_work", f"too much work to decode: more than {_ENTRIES:,} entries in its header")
    end = start + count * order.step
    if end + order.wide > len(data):
        raise UnreadableImage("truncated", f"is cut off: it has {len(data):,} bytes, fewer than its header says")
    changed, values, total = bytearray(data), {}, 0
    for at in range(start, end, order.step):
        tag, kind = order.number(data, at, 2), order.number(data, at + 2, 2)
        number = order.number(data, at + 4, order.wide)
        if tag not in _KEPT:
            changed[at : at + order.step] = _blank(order)
            continue
        if tag in values or kind not in _TYPES:
            raise UnreadableImage("decoder_error", f"has a damaged header: its field {tag} occurs twice or has no type")
        total += number * _TYPES[kind]
        values[tag] = (kind, number, at + 4 + order.wide)
    if total > len(data):
        raise UnreadableImage("truncated", f"is cut off: it has {len(data):,} bytes, fewer than its header says")
    changed[end : end + order.wide] = bytes(order.wide)  # no page after this one
    _check(data, order, values)
    return bytes(changed)


def _blank(order: _Order) -> bytes:
    kind = ">HHQQ" if order.big else ">HHII"
    return struct.pack(kind if order.sign == ">" else kind.replace(">", "<"), _UNUSED, 1, 1, 0)


def _check(data: bytes, order: _Order, fields: dict[int, tuple[int, int, int]]) -> None:
    def values(tag: int, most: int = 1) -> list[int]:
        return _values(data, order, fields.get(tag, (1, 0, 0)), most)

    def value(tag: int, default: int) -> int:
        return next(iter(values(tag)), default)

    compression, photometric, channels = value(_COMPRESSION, 1), value(_PHOTOMETRIC, 0), value(_CHANNELS, 1)
    bits, kinds = values(_BITS, 16) or [1], set(values(_SAMPLE, 16)) or {1}
    if compression not in _COMPRESSIONS:
        raise _other(f"with compression {compression}; save it with LZW or deflate")
    if channels > _MOST_CHANNELS:
        raise _other(f"of {channels} channels; save it with 1, 3 or 4")
    if photometric not in (0, 1, 2, 3, 5, 6):
        raise _other(f"of colour space {photometric}; save it as RGB")
    deepest = max(bits)
    if (deepest > 8 and kinds != {1}) or deepest > 16 or 8 < deepest < 16 or (deepest == 16 and photometric == 0):
        raise _other(f"of {deepest}-bit values of unknown range; save it with 8 bits, or 16 bits of grey from black")
    width, height = value(_WIDTH, 0), value(_LENGTH, 0)
    blocks = max(fields.get(tag, (1, 0, 0))[1] for tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES))
    if blocks > _MOST_BLOCKS:
        raise UnreadableImage("too_much_work", f"too much work to decode: more than {_MOST_BLOCKS:,} strips or tiles")
    across, down = value(_TILE_WIDTH, width), value(_TILE_LENGTH, min(height, value(_ROWS, height)))
    deep = max(channels, len(bits)) * deepest / 8
    if across * down * deep > 4 * width * height * deep + _BLOCK_BYTES:
        size = across * down * deep / 2**30
        raise UnreadableImage("too_much_memory", f"a strip or tile needs {size:.1f} GiB to decode by its header")
    if compression == _JPEG:
        scans = max((data.count(b"\xff\xda", at, at + size) for at, size in _spans(data, order, fields)), default=0)
        if scans > min(100, max(1, _SCANNED // max(1, width * height))):
            raise UnreadableImage("too_much_work", f"too much work to decode: {scans:,} scans of a strip or tile")


def _values(data: bytes, order: _Order, entry: tuple[int, int, int], most: int) -> list[int]:
    """Up to `most` numbers of a field."""
    kind, number, at = entry
    if kind not in _WHOLE:
        raise UnreadableImage("decoder_error", "has a damaged header: a size in it is no whole number")
    size = _TYPES[kind]
    if size * number > order.wide:
        at = order.number(data, at, order.wide)
    return [order.number(data, at + size * i, size) for i in range(min(number, most))]


def _spans(data: bytes, order: _Order, fields: dict[int, tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Start and size of each strip or tile."""
    starts, sizes = (_TILES, _TILE_BYTES) if _TILES in fields else (_STRIPS, _STRIP_BYTES)
    listed = (_values(data, order, fields.get(tag, (1, 0, 0)), _MOST_BLOCKS) for tag in (starts, sizes))
    return list(zip(*listed, strict=False))


def is_cut_off(data: bytes) -> bool:
    """Whether a TIFF has fewer bytes than its first page says."""
    if not data.startswith(MAGIC):
        return False
    order, page = _order(data)
    count, start = order.entries(data, page)
    fields = {}
    for at in range(start, start + min(count, _ENTRIES) * order.step, order.step):
        kind, number = order.number(data, at + 2, 2), order.number(data, at + 4, order.wide)
        fields.setdefault(order.number(data, at, 2), (kind, number, at + 4 + order.wide))
    return any(at + size > len(data) for at, size in _spans(data, order, fields))


def _other(kind: str) -> UnreadableImage:
    return UnreadableImage("other_format", f"is a TIFF image {kind}")


def count_pages(data: bytes) -> int:
    """Pages of a TIFF, up to 10,000."""
    order, page = _order(data)
    pages, seen = 0, set()
    while 8 <= page < len(data) and page not in seen and pages < _MOST_PAGES:
        pages += 1
        seen.add(page)
        count, start = order.entries(data, page)
        end = start + count * order.step
        page = order.number(data, end, order.wide)
    return max(1, pages)


def is_exhausting(data: bytes) -> bool:
    """Whether an EXIF block has more entries, or values longer in all, than one that a camera writes."""
    data = data.removeprefix(b"Exif\0\0")
    if not data.startswith(MAGIC):
        return False
    order, page = _order(data)
    count, start = order.entries(data, page)
    if count > _ENTRIES:
        return True
    places = range(start, min(len(data), start + count * order.step), order.step)
    sizes = (order.number(data, at + 4, order.wide) * _TYPES.get(order.number(data, at + 2, 2), 1) for at in places)
    return sum(size for size in sizes if size <= len(data)) > 2 * len(data)
