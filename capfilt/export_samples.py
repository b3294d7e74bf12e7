"""Samples of an export: kept texts with what is known of their image, and its bytes, as they were or re-encoded."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

from blip.data import images
from blip.data.ahead import read_ahead
from blip.errors import DataError, UnreadableImage
from blip.origin import SYNTHETIC, marking, origins_of
from capfilt.reading import Reader
from capfilt.run import Part, Run
from capfilt.select.choose import kept_of
from capfilt.sources import changed

REENCODED = {"jpg": "JPEG", "webp": "WEBP"}
"""File extensions of the formats that images can be re-encoded to, and Pillow's names of them."""
_QUALITY = 95
_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "HEIF": "heic"}
"""File extensions by format where they are not its name; MPO, of phones and cameras, is a JPEG and more images."""
_AHEAD = 16
"""Images decoded and encoded at once."""
_PASSED_ON = ("sample_id", "source_uri", "source_row", "key", "url", "image_sha256", "width", "height",
              "web_text", "syn_text", "itm_web", "itm_syn", "itc_web", "itc_syn", "extra_json")  # fmt: skip


@dataclass
class ExportSample:
    """A sample of an export: one kept text of an image, or with `together` all of them."""

    name: str
    """Name of the sample: its running number in the export."""
    captions: list[str]
    suffix: str
    """Extension of the image's file."""
    image: bytes
    facts: dict[str, Any]
    """Annotation of the row, and under `kept` the fate of each caption."""
    at: tuple[Part, int]
    """Part, and number of the row in it."""
    text_index: int
    """Which of the row's texts of its source the first caption is."""
    first: bool
    """Whether this is the first sample of its image."""
    image_name: str
    """Running number of the image in the export."""

    @property
    def sources(self) -> list[str]:
        return [fate["source"] for fate in self.facts["kept"]]

    @property
    def scores(self) -> list[float]:
        return [float(fate["score"]) for fate in self.facts["kept"]]  # no text is kept without one

    @property
    def reencoded(self) -> bool:
        return "reencoded_from" in self.facts


@dataclass
class _Kept:
    """A row of which texts are kept."""

    part: Part
    note: dict[str, Any]
    """Annotation of the row."""
    texts: list[dict[str, Any]]
    """Rows of the selection's table."""
    suffix: str
    image: bytes


def suffix_of(form: str) -> str:
    """Return the file extension of a format as Pillow names it."""
    return _SUFFIX.get(form, form.lower())


def formats(run: Run, selection: str) -> dict[str, int]:
    """Count the images of which texts are kept, by file extension. No image is read."""
    counts: Counter[str] = Counter()
    for part, table in kept_of(run, selection):
        if len(table):
            column = run.parts.read(part.pid, ["format"])["format"].to_pylist()
            counts.update(suffix_of(column[row]) for row in set(table["row"].to_pylist()))
    return dict(sorted(counts.items()))


def samples(
    run: Run, selection: str, together: bool, *, reencode: str | None = None, only: str | None = None,
    with_images: bool = True,
) -> Iterator[ExportSample]:  # fmt: skip
    """Yield the samples of a selection in order, one per kept text or, `together`, one per image.

    `reencode` converts images of all other formats to the one of this extension; `only` takes those of one extension.
    DataError if a source or an image is not the one that was scored, or an image cannot be re-encoded.
    """
    number, rows = 0, _kept(run, selection, only, with_images)
    if reencode:
        encode = functools.partial(_reencoded, suffix=reencode, max_pixels=run.config.max_pixels)
        rows = chain.from_iterable(read_ahead(rows, _AHEAD, encode))
    for count, row in enumerate(rows):
        facts = {name: row.note[name] for name in _PASSED_ON}
        facts["extra"] = json.loads(facts.pop("extra_json") or "{}")
        if reencode and suffix_of(row.note["format"]) != row.suffix:
            facts["reencoded_from"] = suffix_of(row.note["format"])
        for i, group in enumerate([row.texts] if together else [[text] for text in row.texts]):
            fates = [{"source": t["text_source"], "score": t["score"], "reason": t["reason"]} for t in group]
            yield ExportSample(
                name=f"{number:09d}",
                captions=[text["text"] for text in group],
                suffix=row.suffix,
                image=row.image,
                facts={**facts, "kept": fates},
                at=(row.part, group[0]["row"]),
                text_index=group[0]["text_index"],
                first=i == 0,
                image_name=f"{count:09d}",
            )
            number += 1


def _kept(run: Run, selection: str, only: str | None, with_images: bool) -> Iterator[_Kept]:
    originals = _Originals(run)
    for part, table in kept_of(run, selection):
        texts = table.to_pylist()
        if not texts:
            continue
        notes = run.parts.read(part.pid, [*_PASSED_ON, "format"]).to_pylist()
        for row, of_row in groupby(texts, key=lambda text: text["row"]):
            suffix = suffix_of(notes[row]["format"])
            if only in (None, suffix):
                image = originals.of(part, notes[row]) if with_images else b""
                yield _Kept(part, notes[row], list(of_row), suffix, image)


class _Originals:
    """Original bytes of scored images; the last source stays open."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._open: tuple[str, Any] = ("", None)

    def of(self, part: Part, note: dict[str, Any]) -> bytes:
        """Return the bytes of an image. DataError if the source or the image has changed since it was scored."""
        if self._open[0] != part.source:
            source = self.run.sources[part.source]
            reason = changed(source)
            if reason:
                raise DataError(f"source_changed: {source.path}: {reason}; its images cannot be exported")
            self._open = part.source, Reader(source, self.run.reading, self.run.storage)
        image = next(self._open[1].read(note["source_row"], note["source_row"] + 1)).image
        if image is None or hashlib.sha256(image).hexdigest() != note["image_sha256"]:
            raise DataError(f"{part.source} row {note['source_row']}: the image is not the one that was scored")
        return image


def _reencoded(row: _Kept, suffix: str, max_pixels: int) -> _Kept:
    """Convert the image of a row, unless it has that format: upright, its first frame, over white."""
    if row.suffix == suffix:
        return row
    buffer = io.BytesIO()
    try:
        mark = marking(REENCODED[suffix]) if origins_of([row.image]) == (SYNTHETIC,) else {}
        images.decode(row.image, max_pixels).save(buffer, REENCODED[suffix], quality=_QUALITY, **mark)
    except (UnreadableImage, OSError, ValueError) as error:  # a side may be too long for the format
        reason = error.reason if isinstance(error, UnreadableImage) else error
        where = f"{row.part.source} row {row.note['source_row']}"
        remedy = "re-encode to the other format, or give --by-format for tar shards"
        raise DataError(f"{where}: the image cannot be re-encoded as {suffix} ({reason}): {remedy}") from None
    return replace(row, suffix=suffix, image=buffer.getvalue())
