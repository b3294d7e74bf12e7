"""Rows of an annotation file, read piece by piece: a list, JSON lines, CSV, Karpathy's splits, or COCO's captions."""

from __future__ import annotations

import gc
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from blip.data.formats.csv_rows import csv_rows
from blip.data.formats.values import kind_of
from blip.errors import BadSample, DataError

CSV = (".csv", ".tsv")
"""Endings of files with a header and fields."""
_CHUNK = 1 << 20
_LONGEST = 64 << 20
"""Most characters of a row."""
_WHOLE = 2 << 30
"""Most bytes of a file that is one object."""
_NEAR = 16
"""Characters before the end of a text within which an error may only mean that the text is incomplete: `-Infinit`."""
_EXPECTED = "expected a list of objects, or one object a line"
_decoder = json.JSONDecoder()

Row = dict[str, Any]
Note = Callable[[str], object]
T = TypeVar("T")


def read_rows(path: Path, note: Note | None = None) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 0, row) of a .json, .jsonl, .csv or .tsv file.

    As `rows_or_faults`, but a row that cannot be used is a DataError, too.
    """
    for number, row in rows_or_faults(path, note):
        if isinstance(row, BadSample):
            raise DataError(f"{path}: row {number} {row.reason}")
        yield number, row


def rows_or_faults(path: Path, note: Note | None = None) -> Iterator[tuple[int, Row | BadSample]]:
    """Yield (row number from 0, row) of a file, with a BadSample in place of an invalid row.

    Invalid rows are lines of JSON lines that are not valid JSON, and values that are not objects. Rows are not all held
    in memory at once, except for files that are one object (Karpathy, COCO; up to 2 GiB), which are flattened; `note`
    gets a message on the parts left out. DataError, naming file, row and what was expected, if the file is at fault.
    """
    try:
        if path.suffix.lower() in CSV:
            yield from enumerate(row for _, row in csv_rows(path))
            return
        yield from _flattened(path, _values(path), note)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,} of what was read") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _values(path: Path) -> Iterator[Row | BadSample]:
    """The rows of a JSON list, of JSON lines, or the objects of a file that is not written line by line."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        start = file.tell()
        lines = _lines(file)
        line = next((line for line in lines if not line.isspace()), b"")
        if not line:
            raise DataError(f"{path} is empty; {_EXPECTED}")
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8")
        if line.lstrip()[:1] == b"[":
            file.seek(start)
            yield from _listed(path, _text(file))
            return
        values = _parsed(line)
        if isinstance(values[0], BadSample):
            whole = _whole(path, file, line)
            if whole is not None:
                yield from whole
                return
        yield from values
        for line in lines:
            if not line.isspace():
                yield from _parsed(line)


def _text(file: IO[bytes]) -> IO[str]:
    return io.TextIOWrapper(file, encoding="utf-8")


def _lines(file: IO[bytes], begun: bytes = b"") -> Iterator[bytes]:
    """Yield the lines of a file after one already begun; a line too long for a row is cut just above the limit."""
    line = begun
    while True:
        while len(line) > _LONGEST and not line.endswith(b"\n"):
            line = file.readline(_LONGEST + 1)
        line = file.readline(_LONGEST + 1)
        if not line:
            return
        yield line


def _parsed(line: bytes) -> list[Row | BadSample]:
    """Parse a line of JSON lines: one row, or several one after another."""
    if len(line) > _LONGEST:
        return [BadSample(f"is longer than {_LONGEST:,} characters")]
    try:
        return [_row(_decoder.decode(line.decode()))]
    except UnicodeDecodeError as error:
        return [BadSample(f"is not UTF-8 text ({error.reason})")]
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            try:
                return [_row(value) for value in _several(line.decode(), 0)]
            except (ValueError, RecursionError):
                pass
        if not line.lstrip().startswith(b"{"):
            shown = line.strip()[:20].decode("utf-8", "replace")
            return [BadSample(f"is not an object but starts with {shown!r}")]
        return [BadSample(f"is not valid JSON ({error})")]


def _several(text: str, at: int) -> Iterator[Any]:
    """The values of a text, one after another."""
    while (at := _skip(text, at)) < len(text):
        value, at = _decoder.raw_decode(text, at)
        yield value


def _row(value: Any) -> Row | BadSample:
    return value if isinstance(value, dict) else BadSample(f"is not an object but {kind_of(value)}")


def _whole(path: Path, file: IO[bytes], line: bytes) -> Iterator[Row | BadSample] | None:
    """The objects of a file whose first line is not one: one large object, or several of a few lines each.

    None if the file has JSON lines after all, with a broken first line. Raises DataError if it is neither.
    """
    after, size = file.tell(), path.stat().st_size
    goes_on, text = len(line) > _LONGEST, ""
    reason: ValueError | RecursionError | None = None
    if not goes_on:
        text = (line + file.read(_CHUNK)).decode("utf-8", "replace")  # it may end in the middle of a character
        try:
            _, end = _decoder.raw_decode(text, _skip(text, 0))
            in_lines = "\n" not in text[:end]  # and something else behind it
            file.seek(after if in_lines else after - len(line))
            return None if in_lines else _listed(path, _text(file), is_list=False)
        except (ValueError, RecursionError) as error:
            reason, goes_on = error, file.tell() < size and _incomplete(error, text)
    if goes_on and size <= _WHOLE:
        file.seek(after)
        text = (line + file.read()).decode()
        try:
            value, end = _without_pauses(lambda: _decoder.raw_decode(text, _skip(text, 0)))
            if _skip(text, end) == len(text):
                return iter([_row(value)])
            in_lines = text.find("\n", 0, end) < 0
            file.seek(after if in_lines else after - len(line))
            return None if in_lines else _listed(path, _text(file), is_list=False)
        except (ValueError, RecursionError) as error:
            reason, goes_on = error, False
    file.seek(after)
    second = next((one for one in _lines(file, line) if not one.isspace()), b"")
    file.seek(after)
    if second and not any(isinstance(row, BadSample) for row in _parsed(second)):
        return None
    if goes_on:
        raise DataError(f"{path}: one object may have {_WHOLE:,} bytes, the file has {size:,}: write one row a line")
    line.decode()  # or say that it is not UTF-8
    text = text.lstrip()
    if not text.startswith("{"):
        raise DataError(f"{path}: row 0 is not an object but starts with {text[:20]!r}; {_EXPECTED}")
    raise DataError(f"{path}: row 0 is not valid JSON ({reason}){_cut_off(reason, text)}")


def _without_pauses(make: Callable[[], T]) -> T:
    """Call a function that makes millions of objects with the garbage collector off, which would revisit them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return make()
    finally:
        if collects:
            gc.enable()


def _listed(path: Path, file: IO[str], *, is_list: bool = True) -> Iterator[Row | BadSample]:
    """The values of a JSON list, or of objects one after another. DataError that names the row where it is broken."""
    buffer, at, row, chunk, begun, ended = "", 0, 0, _CHUNK, not is_list, False
    while True:
        at = _skip(buffer, at, separators=is_list)
        if at == len(buffer):
            buffer, at = file.read(_CHUNK), 0
            if not buffer:
                break
            continue
        if not begun:
            begun, at = True, at + 1
            continue
        if is_list and buffer[at] == "]" and not ended:
            ended, at = True, at + 1
            continue
        if ended:
            raise DataError(f"{path}: row {row} is behind the end of the list: {buffer[at : at + 20]!r}; {_EXPECTED}")
        try:
            value, end = _decoder.raw_decode(buffer, at)
            goes_on = end == len(buffer) and not isinstance(value, dict)  # as a number may
            reason: ValueError | RecursionError | None = None
        except (ValueError, RecursionError) as error:
            reason, goes_on = error, _incomplete(error, buffer)
        if goes_on:
            if len(buffer) - at > _LONGEST:
                raise DataError(f"{path}: row {row} is longer than {_LONGEST:,} characters")
            more = file.read(chunk)
            buffer, at, chunk = buffer[at:] + more, 0, chunk * 2
            if more:
                continue
        if reason is not None:
            raise DataError(f"{path}: row {row} is not valid JSON ({reason}){_cut_off(reason, buffer)}")
        yield _row(value)
        at, row, chunk = end, row + 1, _CHUNK
    if not ended and is_list:
        raise DataError(f"{path}: the list is not closed after row {row - 1}; the file is cut off")


def _incomplete(error: ValueError | RecursionError, text: str) -> bool:
    """Whether an error may only mean that the text is incomplete."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text) - _NEAR or error.msg.startswith("Unterminated string")


def _cut_off(error: ValueError | RecursionError, text: str) -> str:
    return "; the file is cut off" if _incomplete(error, text) else ""


def _skip(text: str, at: int, *, separators: bool = False) -> int:
    skipped = " \t\r\n," if separators else " \t\r\n"
    while at < len(text) and text[at] in skipped:
        at += 1
    return at


# Files that are one object --------------------------------------------------------------------------------------------


def _flattened(
    path: Path, values: Iterator[Row | BadSample], note: Note | None
) -> Iterator[tuple[int, Row | BadSample]]:
    first = next(values, None)
    images = first.get("images") if isinstance(first, dict) else None
    if isinstance(images, list) and not all(isinstance(image, str) for image in images):
        annotations = first.get("annotations")
        if (isinstance(annotations, list) and annotations) or any(_is_coco(image) for image in images[:_PROBES]):
            yield from enumerate(_coco(path, images, annotations or [], note))
        else:
            yield from enumerate(map(_karpathy, images))
        first = next(values, None)
        if first is not None:
            raise DataError(f"{path} has more data after an object with images; expected only that object")
    elif first is not None:
        yield from enumerate(itertools.chain([first], values))


_PROBES = 64


def _is_coco(image: Any) -> bool:
    return isinstance(image, dict) and "file_name" in image and "filename" not in image


def _karpathy(image: Any) -> Row | BadSample:
    """An entry of Karpathy's split files as {image, caption, split}, whatever these hold."""
    if not isinstance(image, dict):
        return _row(image)
    folder, file, sentences = image.get("filepath"), image.get("filename"), image.get("sentences")
    if isinstance(sentences, list):
        sentences = [s.get("raw") if isinstance(s, dict) else None for s in sentences]
    row = {"image": f"{folder}/{file}" if folder and isinstance(file, str) else file, "caption": sentences}
    return row | ({"split": image["split"]} if "split" in image else {})


def same_id(value: Any) -> Any:
    """An id as a number where it is a text that is written as one, so that "139" and 139 are the same."""
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and len(value) < 20 and str(int(value)) == value:
        return int(value)
    return value


def _coco(path: Path, images: list[Any], annotations: list[Any], note: Note | None) -> Iterator[Row | BadSample]:
    """COCO's captions_*.json: one row an image with all its captions. Annotations of no image are counted in a note."""
    if not isinstance(annotations, list):
        raise DataError(f"{path}: annotations is {kind_of(annotations)}; expected COCO's list of image_id and caption")
    captions: dict[Any, list[Any]] = {}
    for image in images:
        if isinstance(image, dict) and _is_id(image.get("id")):
            captions[same_id(image["id"])] = []
    astray, last, has_captions = 0, None, False
    for annotation in annotations:
        name = annotation.get("image_id") if isinstance(annotation, dict) else None
        texts = captions.get(same_id(name)) if _is_id(name) else None
        if texts is None:
            astray, last = astray + 1, annotation
        else:
            texts.append(annotation.get("caption"))
            has_captions = has_captions or "caption" in annotation
    if annotations and not has_captions:
        which = "is of one of its images" if astray == len(annotations) else "has a caption"
        none = f"none of its {len(annotations):,} annotations {which}"
        raise DataError(f"{path} is not COCO's caption format: {none}; the first is {kind_of(annotations[0])}")
    if astray and note is not None:
        of = f", such as image_id {last.get('image_id')!r}" if isinstance(last, dict) else ""
        note(f"{path}: {astray:,} of {len(annotations):,} annotations are of no image in the file{of}; left out")
    for image in images:
        if not isinstance(image, dict):
            yield _row(image)
        elif not _is_id(image.get("id")):
            yield BadSample("has no id")
        else:
            yield {"image": image.get("file_name"), "caption": captions[same_id(image["id"])]}


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
