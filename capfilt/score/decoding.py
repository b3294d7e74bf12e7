"""Decoding of a row: the models' input, and everything recorded about the image."""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile

from blip.data.image_header import count_frames
from blip.data.images import UnreadableImage, model_input, open_image
from blip.data.phash import phash
from blip.errors import BadSample
from blip.text import clean_caption
from capfilt import schema
from capfilt.reading import InputRow
from capfilt.select import rules
from capfilt.settings import ScoreConfig
from capfilt.store.faults import decode_fault

T = TypeVar("T")

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_CONSTANT = 4
"""Range of grey levels below which an image counts as blank."""


@dataclass
class Decoded:
    """A row ready for the models, or the reason why it is not."""

    number: int
    key: str
    texts: list[str]
    norm: list[str | None]
    """Normalised texts, as scored; None for a text without words."""
    extra: dict
    facts: dict
    """Image and status columns."""
    flags: list[str]
    pixels: list[np.ndarray] = field(default_factory=list)
    """Resized images, (S, S, 3) uint8 for each input size; empty if there is nothing to score."""
    more: list[np.ndarray] = field(default_factory=list)
    """The same for the sizes of further scorers."""
    left_out: int = 0
    """Number of texts beyond the limit per row."""


def prepare(row: InputRow, sides: tuple[int, ...], config: ScoreConfig, more: tuple[int, ...] = ()) -> Decoded:
    """Decode and resize an image and record its facts; never raises because of a row's contents.

    `sides` are the models' input sizes, `more` those of further scorers.
    """
    texts, left_out, note = rules.limited(row.texts)
    norm = [_clean(text, config.max_words) for text in texts]
    facts = dict.fromkeys(("width", "height", "format", "n_frames", "error_code", "error_detail"))
    facts |= {"bytes": len(row.image) if row.image is not None else None, "status": "ok"}
    facts |= {"image_sha256": None, "phash64": None}
    facts["error_detail"] = note
    done = Decoded(row.number, row.key, texts, norm, row.extra, facts, [*left_out, *rules.text_flags(texts)])
    done.left_out = len(row.texts) - len(texts)
    if row.problem:
        _fail(facts, *row.problem)
        return done
    assert row.image is not None
    decode_fault(row.key)
    facts["image_sha256"] = hashlib.sha256(row.image).hexdigest()
    if config.rules_first and _ruled_out(row.image, done, config.rules_first):
        return done
    if _see(row.image, done, sides, more, config):
        done.flags += _seen_flags(done)
        if not any(norm):
            facts["status"] = "no_text"
    return done


def _clean(text: str, max_words: int) -> str | None:
    try:
        return clean_caption(text, max_words)
    except BadSample:
        return None


def _fail(facts: dict, status: str, code: str, detail: str) -> None:
    detail = _ADDRESS.sub("", detail).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    facts |= {"status": status, "error_code": code, "error_detail": detail[:300]}


def _see(data: bytes, done: Decoded, sides: tuple[int, ...], more: tuple[int, ...], config: ScoreConfig) -> bool:
    """Decode the image into `done`; returns whether that worked."""
    at_least = max(sides) if config.draft and sides else None

    def note(image: Image.Image) -> tuple[list[np.ndarray], str, tuple[int, int]]:
        shown = {side: _scaled(image, side) for side in dict.fromkeys(sides if at_least else (*sides, *more))}
        done.more = [] if at_least else [shown[side] for side in more]
        return [shown[side] for side in sides], phash(image), image.size

    try:
        done.pixels, done.facts["phash64"], (width, height) = model_input(data, config.max_pixels, note, at_least)
    except UnreadableImage as error:
        status, code, detail = schema.problem(error)
        if status != "too_large":
            _header(data, done.facts)
        lenient = _lenient(data, note) if status == "truncated" and config.lenient else None
        if lenient is None:
            _fail(done.facts, status, code, detail)
            return False
        done.pixels, done.facts["phash64"], _ = lenient
        done.flags.append("image.truncated")
        return True
    _header(data, done.facts)
    if not at_least:
        done.facts |= {"width": width, "height": height}  # upright
    elif more:  # drafts are made for the models alone: what they see must not depend on other scorers
        with contextlib.suppress(UnreadableImage):
            done.more = model_input(data, config.max_pixels, lambda image: [_scaled(image, side) for side in more])
    return True


def _scaled(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _header(data: bytes, facts: dict) -> bool:
    """Record size, format and frames from a file's header, if readable; returns whether the size is known."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(data) as image:
                facts |= {"width": image.width, "height": image.height, "format": image.format, "n_frames": 1}
                facts["n_frames"] = count_frames(data, image)
        return True
    except Exception:  # Pillow raises whatever its decoders raise; the decoder has said why already
        return facts["width"] is not None


def _lenient(data: bytes, note: Callable[[Image.Image], T]) -> T | None:
    """Apply `note` to a truncated image with its missing part grey, as the original release trained on."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with open_image(data) as image:
            return note(image.convert("RGB"))
    except Exception:
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _ruled_out(data: bytes, done: Decoded, preset: str) -> bool:
    """Tell whether the rules on image files exclude an image before it is decoded."""
    if not _header(data, done.facts):
        return False
    facts = done.facts
    flags = rules.image_flags(facts["width"], facts["height"], len(data), facts["n_frames"])
    broken = [flag for flag in flags if rules.of_preset(preset, flag)]
    if broken:
        done.flags += flags
        _fail(facts, "rule", "rule", ", ".join(broken))
    return bool(broken)


def _seen_flags(done: Decoded) -> list[str]:
    facts = done.facts
    flags = rules.image_flags(facts["width"], facts["height"], facts["bytes"], facts["n_frames"])
    if done.pixels and np.ptp(done.pixels[0][::4, ::4].reshape(-1, 3), axis=0).max() < _CONSTANT:
        flags.append("image.constant")
    return flags
