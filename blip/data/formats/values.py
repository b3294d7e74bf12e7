"""Values of a row's columns in any format: an image and captions, or the reason why they cannot be used.

Imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

from blip.errors import BadSample


def image_of(value: Any) -> bytes | str:
    """The encoded image or its path from an image column's value: bytes, a path, or {bytes, path}. Raises BadSample.

    The value may also be a BadSample from reading it.
    """
    if isinstance(value, BadSample):
        raise value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        if encodable(value) != value:
            raise BadSample(f"image {value[:60]!r} is not a path: it holds half a character", "no_image")
        return value
    if value is None:
        raise BadSample("the row has no image", "no_image")
    reason = f"the row has no image: expected bytes, a path or {{bytes, path}}, found {kind_of(value)}"
    raise BadSample(reason, "no_image")


def captions_of(value: Any) -> list[str]:
    """The captions from a caption column's value: a text, or the texts of a list. Raises BadSample if there is none.

    The value may also be a BadSample from reading it.
    """
    if isinstance(value, BadSample):
        raise value
    if isinstance(value, str):
        return [encodable(value)]
    if isinstance(value, list):
        texts = [encodable(text) for text in value if isinstance(text, str)]
        if texts:
            return texts
    if value is None:
        raise BadSample("the row has no caption", "no_caption")
    if value == []:
        raise BadSample("the row has no caption: its list is empty", "no_caption")
    reason = f"the row has no caption: expected a text or a list of texts, found {kind_of(value)}"
    raise BadSample(reason, "no_caption")


def encodable(text: str) -> str:
    """Text with unpaired surrogates removed, which JSON may hold and nothing can store."""
    return text if text.isascii() else text.encode("utf-8", "ignore").decode("utf-8")


def kind_of(value: Any) -> str:
    """Short description of a value of JSON or of a table."""
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, list(value)[:5]))[:60] or 'nothing'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing (null)"
    return f"{str(value)[:60]!r}" if isinstance(value, str | bytes) else f"{value!r}"[:60]
