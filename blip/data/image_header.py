"""Count the cost of decoding an image from its bytes before any pixel is decoded, and strip irrelevant bytes.

The size in the header does not bound a decoder's work: scans of a JPEG repeat, metadata unpacks to any length, blocks
may be empty. All counts here are functions of the bytes alone, so an image that is refused is refused everywhere and
every time.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from blip.data import tiff
from blip.errors import UnreadableImage

MAX_BYTES = 256 << 20
"""Encoded images larger than this are refused unread."""
MAX_SIDE, MAX_ASPECT = 65_535, 1_000
"""Most pixels of a side, and largest aspect ratio."""
MAX_SCANS = 100
"""Passes over the pixels of a JPEG; cameras and editors make 1 to 20."""
_SCANNED = 4_000_000_000
"""Pixels times scans: some seconds, as an empty scan costs about a nanosecond a pixel."""
_MOST_PARTS = 100_000
"""Most segments, chunks or blocks that are walked through in Python."""
_METADATA_PARTS = 1_000
"""Most metadata parts of a header; more are cut out, as Pillow keeps and joins them."""
_RUN_LENGTH_PIXELS = 10_000_000
"""Most pixels of a run-length encoded bitmap, which Pillow decodes in Python at about a microsecond a byte."""

_SCAN = re.compile(rb"\xff\xda")
_NEXT = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
"""Marker that ends entropy-coded data of a JPEG: neither stuffing nor a restart."""
_NOT_FILL = re.compile(rb"[^\xff]")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})
"""Markers without a length."""
_PNG_KIND = re.compile(rb"\w{4}")
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IEND"})
_PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_UPRIGHT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Texts that may hold the orientation, a few of which are kept, up to a size that Pillow unpacks."""
_PNG_TEXT_BYTES, _PNG_TEXTS = 64 << 10, 8
_PNG_TEXT_UNPACKED = 1 << 19
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def screened(data: bytes) -> bytes:
    """The bytes of an image that decide its pixels, for Pillow to decode. Raises UnreadableImage.

    Metadata that could make decoding fail or slow is left out; most images are unchanged. Damage is left for the
    decoder to report.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif(data)
    if data.startswith(b"BM"):
        _bmp(data)
    return data


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise UnreadableImage for too many pixels, or for an extreme side or aspect ratio."""
    by = f"{width:,} x {height:,} pixels by its header"
    if width < 1 or height < 1:
        raise UnreadableImage("not_an_image", by)
    if width * height > max_pixels:
        raise UnreadableImage("too_many_pixels", f"{by}, more than the limit of {max_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise UnreadableImage("too_many_pixels", f"{by}, more than the limit of {MAX_SIDE:,} for a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage("too_many_pixels", f"{by}, more than the limit of {MAX_ASPECT:,} to 1")


def count_frames(data: bytes, image: Image.Image) -> int:
    """Frames or pages of an image opened from `data`, counted up to 10,000 where they are not in its header."""
    if image.format == "TIFF":
        return tiff.count_pages(data)
    if image.format != "GIF":
        return getattr(image, "n_frames", 1)
    frames = 0
    with contextlib.suppress(UnreadableImage):  # more blocks than are walked through: those so far
        for kind, _, _ in _gif_blocks(data):
            frames += kind == 0x2C
            if frames == 10_000:
                break
    return max(1, frames)


def _too_many(what: str, most: int) -> UnreadableImage:
    return UnreadableImage("too_much_work", f"too much work to decode: more than {most:,} {what}")


# JPEG -----------------------------------------------------------------------------------------------------------------


def _jpeg(data: bytes) -> bytes:
    segments, (width, height, several), scan, left_out = _jpeg_header(data)
    if scan is None:  # no pixels: the decoder says so
        return data
    most = max(1, min(MAX_SCANS, _SCANNED // max(1, width * height)))
    if several and len(_SCAN.findall(data)) > most and _jpeg_scans(data, scan, most) > most:
        raise _too_many(f"scans of {width:,} x {height:,} pixels", most)
    return b"".join([b"\xff\xd8", *(data[a:b] for a, b in segments), data[scan:]]) if left_out else data


def _jpeg_header(data: bytes) -> tuple[list[tuple[int, int]], tuple[int, int, bool], int | None, bool]:
    """Relevant segments; width, height and whether there may be several scans; start of the first scan or None; and
    whether there is much other data.
    """
    at, parts, junk, exif, frame = 2, 0, 0, 0, (0, 0, False)
    channels = 0
    segments: list[tuple[int, int]] = []
    while at + 4 <= len(data):
        start = data.find(b"\xff", at)
        mark = _NOT_FILL.search(data, start) if start >= 0 else None
        if mark is None:
            return segments, frame, None, False
        junk, parts, begin, kind = junk + mark.start() - at, parts + 1, mark.start() - 1, data[mark.start()]
        if parts > _MOST_PARTS:
            raise _too_many("segments", _MOST_PARTS)
        at = mark.end()
        if kind == _SOS:
            frame = (*frame[:2], frame[2] or data[at + 2] < channels)
            return segments, frame, begin, parts > _METADATA_PARTS or junk > _METADATA_PARTS + parts or exif > 8
        if kind == 0 or kind in _ALONE:
            continue
        at += int.from_bytes(data[at : at + 2], "big")
        if kind in _FRAMES:
            height, width, channels = struct.unpack(">HHB", data[begin + 5 : begin + 10].ljust(5, b"\0"))
            frame = width, height, kind in _PROGRESSIVE
        upright = kind == 0xE1 and data.startswith(b"Exif\0\0", begin + 4)
        exif += upright
        if not (kind == _COM or 0xE0 <= kind <= 0xEF) or kind in (0xE0, 0xEE) or (upright and exif == 1):
            segments.append((begin, at))
    return segments, frame, None, False


def _jpeg_scans(data: bytes, at: int, most: int) -> int:
    """Count scans from the first one, at `at`, to the end of the image; further images in the file are ignored."""
    scans = parts = 0
    while scans <= most and at + 4 <= len(data):
        kind = data[at + 1]
        parts += 1
        if kind == _EOI:
            break
        if parts > _MOST_PARTS:
            raise _too_many("segments", _MOST_PARTS)
        at += 2 if kind in _ALONE and kind != _SOS else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        scans += kind == _SOS
        mark = _NEXT.search(data, at)
        if mark is None:
            break
        at = mark.end() - 2
    return scans


# PNG ------------------------------------------------------------------------------------------------------------------


def _png(data: bytes) -> bytes:
    chunks, at, packed, parts, texts = [(0, 8)], 8, 0, 0, 0
    whole, animated = True, False
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end, parts = at + 12 + length, parts + 1
        if parts > _MOST_PARTS:
            raise _too_many("chunks", _MOST_PARTS)
        if end > len(data) or not _PNG_KIND.fullmatch(kind):  # damaged from here on
            break
        if kind == b"IDAT":
            packed += length
        animated |= kind == b"acTL"
        if kind == b"fcTL" and packed and animated:  # of the second frame, up to which Pillow reads
            break
        upright = texts < _PNG_TEXTS and _png_upright(data, at, length, kind)
        texts += upright
        if kind in _PNG_KEPT or upright:
            chunks.append((at, end))
        else:
            whole = False
        at = end
        if kind == b"IEND":
            at = len(data)
            break
    _check_packed(data, packed)
    if whole:
        return data
    return b"".join([*(data[a:b] for a, b in _joined(chunks)), data[at:]])


def _png_upright(data: bytes, at: int, length: int, kind: bytes) -> bool:
    if kind not in _PNG_TEXT or length > _PNG_TEXT_BYTES or not data.startswith(_PNG_UPRIGHT, at + 8):
        return False
    if kind == b"tEXt":
        return True
    body = data[at + 8 : at + 8 + length].partition(b"\0")[2]
    if kind == b"iTXt":
        flag, method, rest = body[:1], body[1:2], body[2:]
        if flag == b"\0":
            return True
        packed = rest.partition(b"\0")[2].partition(b"\0")[2]
    else:
        method, packed = body[:1], body[1:]
    return method == b"\0" and _unpacks(packed)


def _unpacks(packed: bytes) -> bool:
    """Whether compressed text unpacks to no more than is kept."""
    with contextlib.suppress(zlib.error):
        return len(zlib.decompressobj().decompress(packed, _PNG_TEXT_UNPACKED)) < _PNG_TEXT_UNPACKED
    return False


def _check_packed(data: bytes, packed: int) -> None:
    """Compressed data may be longer than the pixels, by a little."""
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26].ljust(10, b"\0"))
    raw = height * (width * depth * _PNG_CHANNELS.get(colour, 4) // 8 + 2)
    if packed > 2 * raw + (1 << 20):
        raise UnreadableImage(
            "too_much_work", f"too much work to decode: {packed:,} compressed bytes for {width:,} x {height:,} pixels"
        )


def _joined(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Merge neighbouring spans."""
    start, end = spans[0]
    for a, b in spans[1:]:
        if a != end:
            yield start, end
            start = a
        end = b
    yield start, end


# GIF, BMP, WEBP -------------------------------------------------------------------------------------------------------


def _gif_blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield kind (0x2C image, 0x21 extension), start and end of each block of a GIF, up to the first damage."""
    at, parts = _gif_start(data), 0
    while at + 2 < len(data) and data[at] != 0x3B:
        begin, kind, parts = at, data[at], parts + 1
        if kind == 0x2C:
            flags = data[at + 9] if at + 9 < len(data) else 0
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            if at > len(data):
                return
            yield kind, begin, at
        at += 2 * (kind == 0x21)
        if kind not in (0x2C, 0x21):  # skipped byte by byte by Pillow
            at += 1
        else:
            while at < len(data) and data[at] and parts <= 10 * _MOST_PARTS:
                at, parts = at + 1 + data[at], parts + 1
            at += 1
        if parts > 10 * _MOST_PARTS:
            raise _too_many("blocks", 10 * _MOST_PARTS)
        if kind == 0x21:
            yield kind, begin, min(at, len(data))


def _gif_start(data: bytes) -> int:
    return 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)


def _gif(data: bytes) -> bytes:
    control: list[tuple[int, int]] = []
    for kind, begin, end in _gif_blocks(data):
        if kind == 0x2C:
            most = 255 * _METADATA_PARTS
            if begin - _gif_start(data) <= most:
                return data
            return data[: _gif_start(data)] + b"".join(data[a:b] for a, b in control[-1:]) + data[begin:]
        if data[begin + 1] == 0xF9:
            control.append((begin, end))
    return data


def _bmp(data: bytes) -> None:
    if len(data) < 34 or int.from_bytes(data[14:18], "little") < 40:
        return
    width, height, compression = *struct.unpack("<ii", data[18:26]), int.from_bytes(data[30:34], "little")
    pixels, height = abs(width * height), abs(height)
    if compression in (1, 2):
        if pixels > _RUN_LENGTH_PIXELS:
            raise UnreadableImage(
                "too_many_pixels",
                f"{width:,} x {height:,} pixels by its header, more than the limit of {_RUN_LENGTH_PIXELS:,} for a "
                "run-length encoded bitmap",
            )
        if len(data) > 2 * (pixels + height) + _PNG_TEXT_BYTES:
            raise UnreadableImage(
                "too_much_work", f"too much work to decode: {len(data):,} bytes for {width:,} x {height:,} pixels"
            )


def cut_off(data: bytes) -> bool:
    """Whether a WEBP or TIFF has fewer bytes than its header declares, which decoders report like other damage."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return tiff.is_cut_off(data)


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WEBP; None for anything else."""
    if not (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
        return None
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X" and len(body) == 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(body) == 10:
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None
