"""Where training images come from: a mark in the synthetic world's images, and what a model folder records.

A model that has seen only synthetic shapes says nothing about photographs, and every program that loads it says so.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

SYNTHETIC, OTHER = "synthetic shapes", "other images"
"""What a model can be trained on: the synthetic world, and everything else."""
KEY = "trained_on"
"""Key of the origins in config.json, and beside the weights in an exported `.pth`."""
MARK = b"openblip: synthetic shapes"
"""JPEG comment of the synthetic world's images, which goes wherever their bytes go; other formats have it in EXIF."""
NOTE = "trained on synthetic shapes; on photographs its answers mean nothing"
_STARTS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")
"""First bytes of image files; a web page or an empty file in an image's place has no origin."""
_HEAD = 1024
"""Bytes in which the mark is looked for, at the start of a file and, in WebP, at its end, where that has its EXIF."""
_DESCRIPTION = 0x010E
"""ImageDescription of EXIF."""
_MOST, _LONGEST = 16, 100


def origins_of(images: Iterable[bytes | Path | Any]) -> tuple[str, ...]:
    """Origins of some encoded images (or their files), sorted; what is no image, or cannot be read, is left out."""
    ends = [_ends(image) for image in images]
    return union(*((SYNTHETIC if MARK in end else OTHER,) for end in ends if end.startswith(_STARTS)))


def marking(form: str) -> dict[str, Any]:
    """Options of `PIL.Image.save` that mark an image of this format as one of the synthetic world."""
    if form == "JPEG":
        return {"comment": MARK}
    from PIL import Image

    exif = Image.Exif()
    exif[_DESCRIPTION] = MARK.decode()
    return {"exif": exif}


def _ends(image: bytes | Path | Any) -> bytes:
    """The first bytes of an image, followed by the last of a WebP."""
    if isinstance(image, bytes):
        return _ends_of(io.BytesIO(image))
    if not isinstance(image, Path):  # a decoded image; only other programs hand these over
        return _STARTS[0]
    try:
        with image.open("rb") as file:
            return _ends_of(file)
    except OSError:
        return b""


def _ends_of(file: BinaryIO) -> bytes:
    head = file.read(_HEAD)
    if head.startswith(b"RIFF") and len(head) == _HEAD:
        file.seek(max(_HEAD, file.seek(0, os.SEEK_END) - _HEAD))
        head += file.read()
    return head


def union(*trained_on: Iterable[str]) -> tuple[str, ...]:
    """All origins, sorted, each once."""
    return tuple(sorted({one for origins in trained_on for one in origins}))


def check_origins(value: Any) -> tuple[str, ...]:
    """Check the origins in a config.json: a list of short, printable texts. ValueError for anything else."""
    fits = isinstance(value, list) and len(value) <= _MOST
    if not fits or not all(isinstance(one, str) and 0 < len(one) <= _LONGEST and one.isprintable() for one in value):
        raise ValueError(f"{KEY} must be a list of up to {_MOST} short texts, such as [{SYNTHETIC!r}]")
    return tuple(value)


def claimed(settings: Any) -> tuple[str, ...]:
    """Origins that another program's file states, if it means what we mean; empty otherwise."""
    try:
        return check_origins(settings.get(KEY, [])) if isinstance(settings, dict) else ()
    except ValueError:
        return ()


def is_synthetic(trained_on: Sequence[str]) -> bool:
    """Whether a model has seen nothing but synthetic shapes."""
    return tuple(trained_on) == (SYNTHETIC,)


_printed: list[str] = []


def print_note(trained_on: Sequence[str], *, once: bool = False) -> None:
    """Print on stderr that a model knows only synthetic shapes, if so; with `once`, only the first time.

    Of the processes of a launcher the first prints it.
    """
    if is_synthetic(trained_on) and not (once and _printed) and os.environ.get("RANK", "0") == "0":
        _printed.append(NOTE)
        print(f"note: {NOTE}", file=sys.stderr, flush=True)
