"""Decode untrusted image bytes to RGB, or raise one clear error."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile, UnidentifiedImageError

from blip.data import isobmff, tiff
from blip.data.image_header import MAX_BYTES, check_size, cut_off, screened, webp_size
from blip.data.jpeg_end import with_end
from blip.errors import BadSample, Stopped, UnreadableImage

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that Pillow decodes here. Its others are rarely needed for images of the web and have most of its holes."""
NAMES = ", ".join((*FORMATS, "HEIC"))
"""All formats that are decoded, for messages; HEIC if pillow-heif is installed."""
MAX_MEMORY = 1 << 30
"""Most bytes of memory for decoding one image, without its file."""
_WEBP = 18
"""Bytes per pixel that libwebp's canvases and Pillow's copies take together."""
_COLOUR_DIFFERENCES = 20
"""Bytes per pixel that the planes of an AVIF or HEIC and their copies take together."""
_BAND = 4_000_000
"""Pixels converted at a time."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that sets an image upright, by EXIF orientation."""

_OTHER = {
    b"%PDF": "is a PDF document",
    b"PK\x03\x04": "is a zip archive",
    b"\x1f\x8b": "is a gzip file",
    b"8BPS": "is a Photoshop document",
}
_CUT_OFF = ("truncated", "broken data stream", "unexpected end")
"""Pillow's messages, as it has no codes, for pixels that end or break before they are all there."""


def decode(image: bytes | Path | Image.Image, max_pixels: int, at_least: int | None = None) -> Image.Image:
    """Decode to RGB: upright by its EXIF tag, transparency over white, first frame or page.

    The header is checked against `max_pixels`, the limits on sides and aspect ratio, and 1 GiB of memory before any
    pixel is decoded, and so is the work that the bytes require. `at_least` allows a JPEG to be decoded at a fraction of
    its size as long as both sides keep that many pixels, which is several times faster for photographs. Raises
    UnreadableImage for any error of the decoder; a truncated file is refused, except for a JPEG of which only the end
    after its pixels is missing.
    """
    with own_fault():
        if isinstance(image, Image.Image):
            check_size(*image.size, max_pixels)
            return _turned(_rgb(image), _turn(image))
        data = read(image) if isinstance(image, Path) else image
        if foreign := _foreign(data):
            raise UnreadableImage(*foreign)
        try:
            return _decode(data, max_pixels, at_least)
        except Image.DecompressionBombError:
            raise UnreadableImage("too_many_pixels", f"more pixels than the limit of {max_pixels:,}") from None
        except (OSError, ValueError):
            if not cut_off(data):
                raise
            raise UnreadableImage(
                "truncated", f"is cut off: it has {len(data):,} bytes, fewer than its header says"
            ) from None


def open_image(data: bytes) -> Image.Image:
    """Open encoded bytes: header only, without metadata, by the formats that are allowed. Raises as Pillow does.

    UnreadableImage if decoding would take more work than the pixels justify, or a decoder is not installed.
    """
    if isobmff.is_isobmff(data):
        header, data = isobmff.read_header(data)
        return _open_avif(data) if header.codec == "AVIF" else _open_heic(data)
    if not data.startswith(tiff.MAGIC):
        return Image.open(io.BytesIO(screened(data)), formats=FORMATS)
    _silence_libtiff()
    try:
        return Image.open(io.BytesIO(tiff.first_page(data)), formats=["TIFF"])
    except UnidentifiedImageError:
        raise UnreadableImage("other_format", "is a TIFF image of a rare kind, or damaged in its header") from None


def _open_avif(data: bytes) -> Image.Image:
    if not AvifImagePlugin.SUPPORTED:
        raise UnreadableImage("no_decoder", "is an AVIF image, for which this Pillow was built without a decoder")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded side by side, and more threads take more memory
    return Image.open(io.BytesIO(data), formats=["AVIF"])


def _open_heic(data: bytes) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise UnreadableImage("no_decoder", "is a HEIC image: pip install 'pillow-heif>=1'") from None
    try:
        return HeifImageFile(io.BytesIO(data))
    except SyntaxError:
        raise UnreadableImage("not_an_image", "is a HEIC image that is damaged in its header") from None


@functools.cache
def _silence_libtiff() -> None:
    """Turn off the messages that libtiff prints itself; Pillow raises an error or there is nothing to say."""
    with contextlib.suppress(OSError, AttributeError):  # where Pillow is linked in another way
        library = ctypes.CDLL(Image.core.__file__)
        for set_handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


def model_input(
    image: bytes | Path | Image.Image,
    max_pixels: int,
    transform: Callable[[Image.Image], T],
    at_least: int | None = None,
) -> T:
    """Decode an image and apply `transform`; any error of either becomes an UnreadableImage.

    One image must not affect the others, and its size can be too much for a transform, too.
    """
    with own_fault():
        return transform(decode(image, max_pixels, at_least))


def small(image: Image.Image, side: int) -> Image.Image:
    """Shrink an image to at most `side` pixels per side, for display; a smaller one is returned unchanged."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


@contextlib.contextmanager
def own_fault() -> Iterator[None]:
    """Turn any error in processing an image into UnreadableImage, so that it affects this image only."""
    try:
        yield
    except (BadSample, Stopped):
        raise
    except UnidentifiedImageError:
        reason = f"not one of {NAMES}, or damaged in its first bytes"
        raise UnreadableImage("not_an_image", reason) from None
    except MemoryError:
        raise UnreadableImage("too_much_memory", "too little memory to decode it") from None
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, IndexError, ...
        code = "truncated" if _is_cut(error) else "decoder_error"
        raise UnreadableImage(code, f"{type(error).__name__}: {str(error)[:200]}") from None


def read(path: Path) -> bytes:
    """Read an image file. Raises UnreadableImage if it is missing, too large or not a regular file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a named pipe must not block
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise UnreadableImage("not_a_file", "not a regular file")
            if info.st_size > MAX_BYTES:
                raise UnreadableImage("too_many_bytes", f"{info.st_size:,} bytes, more than the limit of {MAX_BYTES:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        raise UnreadableImage("missing_file", "no such file") from None
    except OSError as error:
        raise UnreadableImage("unreadable", f"cannot be read: {error.strerror}") from None


def _foreign(data: bytes) -> tuple[str, str] | None:
    """Code and reason for bytes that are not an image, for the most common accidents."""
    if not data:
        return "empty_file", "is empty (0 bytes)"
    if data.startswith(b"version https://git-lfs"):
        return "git_lfs_pointer", "is a git-LFS pointer, not the image: run `git lfs pull`"
    for start, what in _OTHER.items():
        if data.startswith(start):
            return "other_format", what
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "html_page", "is an HTML page, not an image: the download failed"
    if text.startswith((b"<svg", b"<?xml")):
        return "xml_or_svg", "is XML or SVG"
    return None


def _decode(data: bytes, max_pixels: int, at_least: int | None) -> Image.Image:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library that sets it would fill half an image with grey in silence
    # Pillow lets these decoders allocate the canvas before anybody can look.
    for size, cost in ((webp_size(data), _WEBP), (isobmff.coded_size(data), _COLOUR_DIFFERENCES)):
        if size:
            check_size(*size, max_pixels)
            _check_memory(size[0] * size[1] * cost)
    try:
        rgb, turn = _as_stored(data, max_pixels, at_least)
    except OSError as error:
        if not (data.startswith(b"\xff\xd8") and _is_cut(error)):
            raise
        ended = with_end(data, lambda one: hashlib.sha256(_as_stored(one, max_pixels)[0].tobytes()).digest())
        if ended is None:
            raise
        rgb, turn = _as_stored(ended, max_pixels, at_least)
    return _turned(rgb, turn)  # what was decoded is freed by now


def _is_cut(error: Exception) -> bool:
    return any(words in str(error) for words in _CUT_OFF)


def _as_stored(data: bytes, max_pixels: int, at_least: int | None = None) -> tuple[Image.Image, Image.Transpose | None]:
    """Convert to RGB; returns the image, and the transposition that sets it upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit below is the one that counts
        with open_image(data) as image:
            check_size(*image.size, max_pixels)
            buffered = _jpeg_buffer(image)
            if at_least and image.format == "JPEG":
                image.draft(None, (at_least, at_least))
            pixels, stored = image.width * image.height, _stored(image.mode)
            _check_memory(max(buffered + pixels * stored, pixels * (stored + 4)))
            image.load()
            return _rgb(image), _turn(image)


def _check_memory(size: float) -> None:
    if size > MAX_MEMORY:
        reason = f"needs {size / 2**30:.1f} GiB to decode by its header, more than the limit of 1 GiB"
        raise UnreadableImage("too_much_memory", reason)


def _stored(mode: str) -> int:
    """Bytes per pixel in Pillow's memory."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def _jpeg_buffer(image: Image.Image) -> float:
    """Bytes of coefficients that libjpeg holds of a progressive image, whatever the fraction that is decoded."""
    if not image.info.get("progressive"):
        return 0
    layers = [(h, v) for _, h, v, _ in image.layer]
    whole = max(h for h, _ in layers) * max(v for _, v in layers)
    return 2 * image.width * image.height * sum(h * v for h, v in layers) / max(1, whole)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        if tiff.is_exhausting(image.info.get("exif") or b""):
            return None
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return None


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert in bands if the image is large, so that intermediate copies are small."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    rows = max(1, _BAND // image.width)
    if rows >= image.height:
        return _band_to_rgb(image)
    made = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        made.paste(_band_to_rgb(band), (0, top))
    return made


def _band_to_rgb(image: Image.Image) -> Image.Image:
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
