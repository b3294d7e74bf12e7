"""Reference captions and results read from files, by image id; errors name the file and row."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blip.data.formats.json_rows import CSV, read_rows, same_id
from blip.data.formats.rows import FIRST_ROWS, find_column
from blip.data.formats.splits import check_split, of_split, refuse_split
from blip.data.formats.values import kind_of
from blip.errors import DataError, counted, shown

ImageId = int | str
"""Convert an id that is written as a number, so that {"139": ...} and {"image_id": 139} are the same image."""
_COCO_NAME = re.compile(r"COCO_[a-z]+20\d\d_0*(\d+)\.jpg$")


class ImageCaptions(NamedTuple):
    """An image with its reference captions."""

    id: ImageId
    captions: list[str]
    """Reference captions; empty if the file only lists images."""
    image: str | None = None
    """Path of the image as given in the file."""
    domain: str | None = None
    """Domain in NoCaps: in-domain, near-domain or out-domain."""


def read_references(
    path: Path, split: str | None = None, image_column: str = "image", caption_column: str = "caption"
) -> list[ImageCaptions]:
    """The images of a JSON file in order, each once.

    Takes COCO's and NoCaps's {images, annotations} (without annotations too), Karpathy's {images: [{sentences}]}, a
    plain {id: [captions]}, and a list or lines of {image, image_id, caption or captions}. DataError names the file, the
    row and what was expected.
    """
    value = _load(path)
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        entries = _karpathy(path, value["images"], split) if _is_karpathy(value) else _coco(path, value, split)
    elif isinstance(value, dict) and "image" not in value and "image_id" not in value:
        entries = _plain(path, value, split)
    else:
        rows = value if isinstance(value, list) else [value]
        names = {name for row in rows[:FIRST_ROWS] if isinstance(row, dict) for name in row}
        image = find_column(names, image_column, "image") or image_column
        caption = find_column(names, caption_column, "caption") or caption_column
        entries = _rows(path, rows, split, image, caption)
    images = list(entries)
    if not images:
        raise DataError(f"{path}: no images")
    return images


def read_results(path: Path) -> dict[ImageId, str]:
    """Read results in the format of COCO's server, [{"image_id": ..., "caption": ...}]. DataError for anything else."""
    rows = _load(path)
    expected = 'expected [{"image_id": ..., "caption": ...}, ...]'
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds {kind_of(rows)}; {expected}")
    results: dict[ImageId, str] = {}
    repeated: list[ImageId] = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"image_id", "caption"} <= row.keys():
            raise DataError(f"{path}: row {number} is {kind_of(row)}; {expected}")
        name = image_id(row["image_id"], f"{path}: row {number}")
        if not isinstance(row["caption"], str):
            raise DataError(f"{path}: row {number}, image {name}: the caption is {kind_of(row['caption'])}, not a text")
        if name in results:
            repeated.append(name)
        results[name] = row["caption"]
    if repeated:
        raise DataError(f"{path}: {counted(repeated, 'image')} more than once; expected one caption an image")
    return results


def matching(references: Mapping[Any, Sequence[str]], results: Mapping[Any, str], *, allow_partial: bool) -> list[Any]:
    """The ids that both have, in the references' order.

    DataError that counts and names them if ids of one are not in the other, an image has no references, or a caption is
    not a text. With `allow_partial`, references without a result are left out.
    """
    if not results:
        raise DataError("no results to score")
    for name, caption in results.items():
        if not isinstance(caption, str):
            raise DataError(f"the result of image {name} is {kind_of(caption)}, not a text")
    unknown = [name for name in results if name not in references]
    if unknown:
        these = counted(unknown, "image")
        raise DataError(f"results for {these} without references; are these the references of another split?")
    missing = [name for name in references if name not in results]
    if missing and not allow_partial:
        these = counted(missing, "image")
        raise DataError(f"no results for {these} of {len(references)}; give all, or allow_partial to score the others")
    names = [name for name in references if name in results]
    for name in names:
        captions = references[name]
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"the references of image {name} are not a list of texts")
    empty = [name for name in names if not len(references[name])]
    if empty:
        raise DataError(f"no reference captions for {counted(empty, 'image')}; nothing can be compared with them")
    return names


def image_id(value: Any, where: str) -> ImageId:
    """Check an id from JSON. DataError if it is neither a whole number nor a string."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where} has {shown(value)} for an image id; expected a whole number or a text")
    return same_id(value)


def _load(path: Path) -> Any:
    """The JSON of a file, or the rows of JSON lines or of a CSV file."""
    if path.suffix.lower() in CSV:
        return [row for _, row in read_rows(path)]
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except _Repeated as error:
        raise DataError(f"{path} has {error} twice in one object; one of the two would be lost") from None
    except (ValueError, RecursionError):  # JSON lines, or an error that names the row
        return [row for _, row in read_rows(path)]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


class _Repeated(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(repr(next(name for name in names if names.count(name) > 1)))
    return unique


def _coco(path: Path, value: dict, split: str | None) -> Iterator[ImageCaptions]:
    """{"images": [{id, file_name, domain?}], "annotations": [{image_id, caption}]}"""
    refuse_split(split, path, "COCO's files")
    entries: dict[ImageId, ImageCaptions] = {}
    for number, image in enumerate(value["images"]):
        where = f"{path}: images[{number}]"
        if not isinstance(image, dict) or "id" not in image:
            raise DataError(f"{where} is {kind_of(image)}; expected an object with an id")
        name = image_id(image["id"], where)
        if name in entries:
            raise DataError(f"{where}: duplicate image {name}")
        domain = image.get("domain")
        entries[name] = ImageCaptions(
            name, [], _text(image.get("file_name")), domain if isinstance(domain, str) else None
        )
    annotations = value.get("annotations") or []
    if not isinstance(annotations, list):
        raise DataError(f"{path}: annotations is {kind_of(annotations)}; expected a list")
    for number, annotation in enumerate(annotations):
        where = f"{path}: annotations[{number}]"
        if not isinstance(annotation, dict) or not {"image_id", "caption"} <= annotation.keys():
            raise DataError(f"{where} is {kind_of(annotation)}; expected an object with image_id and caption")
        name = image_id(annotation["image_id"], where)
        if name not in entries:
            raise DataError(f"{where} is about image {name}, which is not among images")
        entries[name].captions.append(_caption(annotation["caption"], where))
    yield from entries.values()


def _is_karpathy(value: dict) -> bool:
    first = value["images"][0] if value["images"] else None
    return isinstance(first, dict) and "sentences" in first


def _karpathy(path: Path, images: list, split: str | None) -> Iterator[ImageCaptions]:
    """[{filename, filepath?, cocoid or imgid, split, sentences: [{raw}]}]"""
    rows = []
    for number, image in enumerate(images):
        where = f"{path}: images[{number}]"
        try:
            folder, file = image.get("filepath"), image["filename"]
            rows.append(
                {
                    "image": f"{folder}/{file}" if folder else file,
                    "image_id": image["cocoid"] if "cocoid" in image else image["imgid"],
                    "caption": [sentence["raw"] for sentence in image["sentences"]],
                    "split": image.get("split"),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is not an image of Karpathy's splits ({type(error).__name__} {error})") from None
    yield from _rows(path, rows, split, "image", "caption")


def _plain(path: Path, value: dict, split: str | None) -> Iterator[ImageCaptions]:
    """{id: [captions]}"""
    refuse_split(split, path, "objects of captions by id")
    seen: set[ImageId] = set()
    for key, captions in value.items():
        where = f"{path}: image {key}"
        name = image_id(key, where)
        if not isinstance(captions, list):
            raise DataError(f"{where} has {kind_of(captions)}; expected a list of captions")
        if name in seen:
            raise DataError(f"{path}: duplicate image {key}")
        seen.add(name)
        yield ImageCaptions(name, [_caption(caption, where) for caption in captions])


def _rows(
    path: Path, rows: Iterable[Any], split: str | None, image_column: str, column: str
) -> Iterator[ImageCaptions]:
    """Rows of {image, image_id, caption or captions}; those of one image are taken together."""
    entries: dict[ImageId, ImageCaptions] = {}
    seen: Counter[str] = Counter()
    for number, row in of_split(_objects(path, rows), split, path, seen):
        where = f"{path}: row {number}"
        image, domain = row.get(image_column), row.get("domain")
        name = _id_of(row, image, where)
        entry = entries.setdefault(
            name, ImageCaptions(name, [], _text(image), domain if isinstance(domain, str) else None)
        )
        if entry.image != _text(image):
            raise DataError(f"{where}: image id {name} is also that of {entry.image}")
        captions = row.get(column, row.get("captions", []))
        for caption in captions if isinstance(captions, list) else [captions]:
            entry.captions.append(_caption(caption, where))
    check_split(split, path, seen)
    yield from entries.values()


def _objects(path: Path, rows: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            expected = "expected an object with an image or image_id, and captions"
            raise DataError(f"{path}: row {number} is {kind_of(row)}; {expected}")
        yield number, row


def _id_of(row: dict, image: Any, where: str) -> ImageId:
    """`image_id`, or `img_id` as in the original's lists, or the number in COCO's file name, or the image's path."""
    for key in ("image_id", "img_id"):
        if key in row:
            return image_id(row[key], where)
    if not isinstance(image, str) or not image:
        raise DataError(
            f"{where} has neither an image_id nor an image (it has: {', '.join(map(str, row)) or 'nothing'})"
        )
    match = _COCO_NAME.search(image)
    return int(match[1]) if match else image


def _caption(caption: Any, where: str) -> str:
    if not isinstance(caption, str):
        raise DataError(f"{where}: a caption is {kind_of(caption)}, not a text")
    return caption


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
