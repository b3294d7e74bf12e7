"""Rows of an annotation file, read piece by piece: a list, JSON lines, Karpathy's splits, or COCO's captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip.data.errors import DataError

_CHUNK = 1 << 20
_LONGEST = 64 << 20
"""Characters of the longest row; more means a syntax error near its start."""
_decoder = json.JSONDecoder()


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 0, row) of a .json, .jsonl or .csv file.

    A million rows are never held at once, except for files that are one object (Karpathy, COCO), which are flattened.
    Raises DataError that names file, row and what was expected.
    """
    try:
        if path.suffix.lower() == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                yield from enumerate(csv.DictReader(file))
            return
        yield from _flattened(path, _objects(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines, in order."""
    with path.open(encoding="utf-8-sig") as file:
        buffer, at, row, chunk, ended = "", 0, 0, _CHUNK, False
        is_list: bool | None = None
        while True:
            at = _skip(buffer, at, separators=bool(is_list))
            if at == len(buffer):
                buffer, at = file.read(_CHUNK), 0
                if not buffer:
                    break
                continue
            if is_list is None:
                is_list = buffer[at] == "["
                at += is_list
                continue
            if is_list and buffer[at] == "]":
                ended = True
                at += 1
                continue
            if buffer[at] != "{" or ended:
                raise DataError(
                    f"{path}: row {row} is not an object but starts with {buffer[at : at + 20]!r}; "
                    "expected a list of objects, or one object a line"
                )
            try:
                value, at = _decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                more = file.read(chunk) if len(buffer) - at < _LONGEST else ""
                if not more:
                    raise DataError(f"{path}: row {row} is not valid JSON ({error}); is the file cut off?") from None
                buffer, at, chunk = buffer[at:] + more, 0, chunk * 2
                continue
            yield value
            row, chunk = row + 1, _CHUNK
        if is_list and not ended:
            raise DataError(f"{path}: the list is not closed after row {row - 1}; the file is cut off")
        if is_list is None:
            raise DataError(f"{path} is empty; expected a list of objects, or one object a line")


def _skip(buffer: str, at: int, *, separators: bool) -> int:
    skipped = " \t\r\n," if separators else " \t\r\n"
    while at < len(buffer) and buffer[at] in skipped:
        at += 1
    return at


def _flattened(path: Path, objects: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, value in enumerate(objects):
        images = value.get("images")
        if row == 0 and isinstance(images, list) and not all(isinstance(image, str) for image in images):
            annotations = value.get("annotations")
            yield from enumerate(_coco(path, images, annotations) if annotations else (_karpathy(i) for i in images))
        else:
            yield row, value


def _karpathy(image: Any) -> dict[str, Any]:
    """An entry of Karpathy's split files as {image, caption, split}."""
    if not isinstance(image, dict) or "filename" not in image:
        return {}
    folder = image.get("filepath", "")
    return {
        "image": f"{folder}/{image['filename']}" if folder else image["filename"],
        "caption": [s["raw"] for s in image.get("sentences", []) if isinstance(s, dict) and "raw" in s],
        "split": image.get("split"),
    }


def _coco(path: Path, images: list[Any], annotations: list[Any]) -> Iterator[dict[str, Any]]:
    """COCO's captions_*.json: one row an image with all its captions."""
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
        for annotation in annotations:
            captions[annotation["image_id"]].append(annotation["caption"])
        return ({"image": image["file_name"], "caption": captions[image["id"]]} for image in images)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} has images and annotations but is not COCO's caption format: {error!r}") from None
