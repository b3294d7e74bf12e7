"""Bytes that nobody vouches for -> an RGB picture, or one error that says why not."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from blip.data.errors import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded. Pillow's other decoders are rarely needed for pictures of the web and are where its holes are."""
MAX_BYTES = 256 << 20
"""Encoded pictures larger than this are refused unread."""

_OTHER = {
    b"version https://git-lfs": "is a git-LFS pointer, not the picture: run `git lfs pull`",
    b"%PDF": "is a PDF document",
    b"II*\0": "is a TIFF picture",
    b"MM\0*": "is a TIFF picture",
    b"PK\x03\x04": "is a zip archive",
    b"\x1f\x8b": "is a gzip file",
    b"8BPS": "is a Photoshop document",
}


class UnreadableImage(BadSample):
    """A picture that cannot be decoded, or that may not be."""


def decode(image: bytes | Path | Image.Image, max_pixels: int, at_least: int | None = None) -> Image.Image:
    """Decode to RGB: upright by its EXIF tag, transparency over white, first frame of an animation.

    `max_pixels` is held against the header before any pixel is decoded. `at_least` allows a JPEG to be decoded at a
    fraction of its size as long as both sides keep that many pixels, which is several times faster for photographs.
    Raises UnreadableImage, whatever the decoder raised; a truncated file is refused.
    """
    data = read(image) if isinstance(image, Path) else image
    foreign = None if isinstance(data, Image.Image) else _foreign(data)
    if foreign:
        raise UnreadableImage(foreign)
    try:
        return _rgb(_upright(data)) if isinstance(data, Image.Image) else _decode(data, max_pixels, at_least)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"not one of {', '.join(FORMATS)}, or damaged in its first bytes") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more pixels than the limit of {max_pixels:,}") from None
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, IndexError, ...
        raise UnreadableImage(f"{type(error).__name__}: {str(error)[:200]}") from None


def read(path: Path) -> bytes:
    """The bytes of a picture's file. Raises UnreadableImage if it is missing, too large or not a regular file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a named pipe must not block
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise UnreadableImage("not a regular file")
            if info.st_size > MAX_BYTES:
                raise UnreadableImage(f"{info.st_size:,} bytes, more than the limit of {MAX_BYTES:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableImage("no such file") from None
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from None


def _foreign(data: bytes) -> str | None:
    """What bytes are that no picture decoder could read, for the commonest accidents."""
    if not data:
        return "is empty (0 bytes)"
    for start, what in _OTHER.items():
        if data.startswith(start):
            return what
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "is a HEIC picture"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "is an AVIF picture"
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is an HTML page, not a picture: the download failed"
    if text.startswith((b"<svg", b"<?xml")):
        return "is XML or SVG"
    return None


def _webp_pixels(data: bytes) -> int:
    """Pixels by a WebP header; Pillow would let the decoder allocate the canvas before it looks."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X" and len(body) == 10:
        return (1 + int.from_bytes(body[4:7], "little")) * (1 + int.from_bytes(body[7:10], "little"))
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 " and len(body) == 10:
        width, height = struct.unpack("<HH", body[6:10])
        return (width & 0x3FFF) * (height & 0x3FFF)
    return 0


def _limit(pixels: int, max_pixels: int, what: str) -> None:
    if pixels > max_pixels:
        raise UnreadableImage(f"{what} pixels by its header, more than the limit of {max_pixels:,}")


def _decode(data: bytes, max_pixels: int, at_least: int | None) -> Image.Image:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library that sets it would fill half a picture with grey in silence
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        pixels = _webp_pixels(data)
        _limit(pixels, max_pixels, f"{pixels:,}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit below is the one that counts
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _limit(width * height, max_pixels, f"{width:,} x {height:,}")
            if at_least and image.format == "JPEG":
                image.draft(None, (at_least, at_least))
            image.load()
            return _rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:  # asked first, as exif_transpose copies what is upright
        return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith(("I", "F")):
        return _from_deep(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion clips everything above 255 to white."""
    grey = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.clip(np.rint(grey / 257.0), 0, 255).astype(np.uint8))
