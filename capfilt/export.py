"""Export the texts of a selection as a data set that training reads directly, with the images' original bytes.

The same selection gives the same bytes. `_SUCCESS`, which is written last, lists every file with its SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip.errors import DataError
from capfilt.exported import BEGUN, COUNTED, MARKERS, OURS, count
from capfilt.reading import Reader
from capfilt.run import Part, Run
from capfilt.select.choose import kept_of, nothing_kept, read_account
from capfilt.settings import at_least
from capfilt.sources import changed
from capfilt.store.faults import fault_point
from capfilt.store.identity import differences
from capfilt.store.storage import Storage, open_storage

FORMATS = ("wds", "parquet", "json", "uids")
_GROUP = 256
"""Rows per row group of a parquet file."""
_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_SUFFIX |= {"TIFF": "tif", "AVIF": "avif", "HEIF": "heic"}
"""File extensions by format; MPO, which phones and cameras write, is a JPEG followed by more images."""
_PASSED_ON = ("sample_id", "source_uri", "source_row", "key", "url", "image_sha256", "width", "height",
              "web_text", "syn_text", "itm_web", "itm_syn", "itc_web", "itc_syn", "extra_json")  # fmt: skip


@dataclass
class ExportSample:
    """A sample of an export: one kept text of an image, or with `together` all of them."""

    name: str
    """Name of the sample: its running number in the export."""
    captions: list[str]
    suffix: str
    image: bytes
    facts: dict[str, Any]
    first: bool
    """Whether this is the first sample of its image."""
    image_name: str = ""


@dataclass
class _Files:
    """The files of an export being written, with their SHA-256."""

    storage: Storage
    written: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        with self.storage.writing(name) as file:
            yield file
        self.written[name] = {"sha256": self.storage.sha256(name)}
        fault_point("export.after_file")


def export(
    run: Run, selection: str, form: str, to: str, *, shard: int = 10_000, together: bool = False, replace: bool = False,
    allow_empty: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a selection to a folder or object store; returns the manifest.

    One sample per kept text, or with `together` one per image with a list of texts. `replace` removes an older
    export there, whole or in part. The files are opened again and counted before `_SUCCESS` is written. ValueError if
    the folder holds anything else, which training would read as well, or if nothing is kept, unless `allow_empty`;
    DataError if an image is not the one that was scored, or if the files do not hold what is kept.
    """
    at_least(1, shard=shard)
    account = read_account(run, selection)
    kept = sum(account["kept"].values())
    if not kept and not allow_empty:
        raise ValueError(nothing_kept(account))
    files = _Files(open_storage(to))
    about = {
        "format": form,
        "selection": selection,
        "fingerprint": run.fingerprint,
        "shard": shard,
        "together": together,
        "selection_sha256": account["files"]["texts.parquet"],
    }
    _begin(files.storage, about, replace)
    counts = dict.fromkeys(COUNTED, 0)
    if form == "uids":
        _write_uids(run, selection, files, counts)
    else:
        _WRITERS[form](_counted(_samples(run, selection, together), counts), files, shard)
    if counts["pairs"] != kept:
        raise DataError(f"{counts['pairs']} texts were exported and {kept} are kept: run `capfilt verify`")
    in_files = count(files.storage, form, files.written)
    if different := differences({name: counts[name] for name in in_files}, in_files):
        raise DataError(f"{files.storage.root} does not hold what was written ({'; '.join(different)}): export again")
    manifest = {**about, **counts, "files": files.written}
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    files.storage.write("_SUCCESS", content)
    files.storage.remove(BEGUN)
    where = json.dumps({"to": _seen_from(run.storage, files.storage), **manifest})
    run.storage.write(f"exports/{selection}-{form}.json", where.encode())
    return manifest


def _seen_from(run: Storage, to: Storage) -> str:
    """Return the address of an export, relative to the run if it is inside the run's folder and moves with it."""
    return to.address.removeprefix(f"{run.address.rstrip('/')}/")


def exported_to(run: Storage, noted: str) -> Storage:
    """Open the export whose address `_seen_from` returned."""
    return open_storage(noted if "://" in noted or os.path.isabs(noted) else f"{run.address.rstrip('/')}/{noted}")


def _begin(storage: Storage, about: dict[str, Any], replace: bool) -> None:
    """Mark the export as begun. ValueError unless the folder is empty or holds this very export, whole or in part."""
    marker = next((name for name in MARKERS if storage.exists(name)), None)
    if marker is None and (there := storage.entries()):
        raise ValueError(f"{storage.root} is not empty ({', '.join(there[:3])}): give another --to")
    if marker is not None:
        before = json.loads(storage.read(marker))
        changes = differences({key: before.get(key) for key in about}, about)
        if changes and not replace:
            raise ValueError(
                f"{storage.root} holds another export ({'; '.join(changes)}): give another --to, or --replace"
            )
        if changes:
            _remove_export(storage)
    storage.sweep()
    storage.write(BEGUN, (json.dumps(about) + "\n").encode())
    storage.remove("_SUCCESS")


def _remove_export(storage: Storage) -> None:
    """Remove the files of an export. ValueError, with nothing removed, if there are other files among them."""
    there = sorted(storage.listing(""))
    others = [name for name in there if not OURS.fullmatch(name)]
    if others:
        raise ValueError(f"{storage.root} holds {others[0]}, which no export wrote: give another --to")
    for name in [*(name for name in there if name not in MARKERS), *MARKERS]:
        storage.remove(name)


def _counted(samples: Iterator[ExportSample], counts: dict[str, int]) -> Iterator[ExportSample]:
    for sample in samples:
        counts["samples"] += 1
        counts["pairs"] += len(sample.captions)
        counts["images"] += sample.first
        yield sample


def _samples(run: Run, selection: str, together: bool) -> Iterator[ExportSample]:
    number, images, originals = 0, 0, _Images(run)
    for part, table in kept_of(run, selection):
        texts = table.to_pylist()
        if not texts:
            continue
        notes = run.parts.read(part.pid).to_pylist()
        for row, of_row in groupby(texts, key=lambda text: text["row"]):
            note, chosen = notes[row], list(of_row)
            image = originals.of(part, note)
            facts = {name: note[name] for name in _PASSED_ON}
            facts["extra"] = json.loads(facts.pop("extra_json") or "{}")
            groups = [chosen] if together else [[text] for text in chosen]
            for i, group in enumerate(groups):
                fates = [{"source": t["text_source"], "score": t["score"], "reason": t["reason"]} for t in group]
                yield ExportSample(f"{number:09d}", [t["text"] for t in group], _SUFFIX[note["format"]], image,
                           {**facts, "kept": fates}, i == 0, f"{images:09d}")  # fmt: skip
                number += 1
            images += 1


class _Images:
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


def _sharded(samples: Iterator[ExportSample], size: int) -> Iterator[tuple[int, Iterator[ExportSample]]]:
    """Group samples by the number of their file."""
    return groupby(samples, key=lambda sample: int(sample.name) // size)


# Formats --------------------------------------------------------------------------------------------------------------


def _write_wds(samples: Iterator[ExportSample], files: _Files, size: int) -> None:
    for number, group in _sharded(samples, size):
        with (
            files.writing(f"{number:05d}.tar") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for sample in group:
                _add(tar, f"{sample.name}.{sample.suffix}", sample.image)
                if len(sample.captions) == 1:
                    _add(tar, f"{sample.name}.txt", sample.captions[0].encode())
                record = {
                    "caption": sample.captions if len(sample.captions) > 1 else sample.captions[0],
                    **sample.facts,
                }
                _add(tar, f"{sample.name}.json", json.dumps(record).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_parquet(samples: Iterator[ExportSample], files: _Files, size: int) -> None:
    schema = _hosted_schema()
    for number, group in _sharded(samples, size):
        with files.writing(f"{number:05d}.parquet") as file, pq.ParquetWriter(file, schema) as writer:
            rows = iter(group)
            while some := [_row(sample) for sample in islice(rows, _GROUP)]:
                writer.write_table(pa.Table.from_pylist(some, schema))


def _row(sample: ExportSample) -> dict[str, Any]:
    return {
        "image": {"bytes": sample.image, "path": f"{sample.name}.{sample.suffix}"},
        "caption": sample.captions,
        "sample_id": sample.facts["sample_id"],
        "source": [fate["source"] for fate in sample.facts["kept"]],
        "score": [fate["score"] for fate in sample.facts["kept"]],
        "json": json.dumps(sample.facts),
    }


def _hosted_schema() -> pa.Schema:
    """Return the Arrow schema, with the metadata by which `datasets` recognizes the image column."""
    text, number = {"dtype": "string", "_type": "Value"}, {"dtype": "float32", "_type": "Value"}
    features = {
        "image": {"_type": "Image"},
        "caption": {"feature": text, "_type": "List"},
        "sample_id": text,
        "source": {"feature": text, "_type": "List"},
        "score": {"feature": number, "_type": "List"},
        "json": text,
    }
    types = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "caption": pa.list_(pa.string()),
        "sample_id": pa.string(),
        "source": pa.list_(pa.string()),
        "score": pa.list_(pa.float32()),
        "json": pa.string(),
    }
    return pa.schema(list(types.items()), {"huggingface": json.dumps({"info": {"features": features}})})


def _write_json(samples: Iterator[ExportSample], files: _Files, size: int) -> None:
    """Write captions.json with one {image, caption} per sample, and each image once under images/."""
    with files.writing("captions.json") as listing:
        start = b"[\n"
        for sample in samples:
            name = f"images/{int(sample.image_name) // size:05d}/{sample.image_name}.{sample.suffix}"
            if sample.first:
                with files.writing(name) as file:
                    file.write(sample.image)
            caption = sample.captions[0] if len(sample.captions) == 1 else sample.captions
            listing.write(start + json.dumps({"image": name, "caption": caption}).encode())
            start = b",\n"
        listing.write(b"[]\n" if start == b"[\n" else b"\n]\n")


def _write_uids(run: Run, selection: str, files: _Files, counts: dict[str, int]) -> None:
    """Write DataComp's format: each kept image's uid (the input's own if it has one) as two integers, sorted."""
    uids = set()
    for part, table in kept_of(run, selection):
        counts["pairs"] += len(table)
        rows = sorted(set(table["row"].to_pylist()))
        if rows:
            notes = run.parts.read(part.pid, ["sample_id", "extra_json"]).take(rows).to_pylist()
            uids |= {str(json.loads(n["extra_json"]).get("uid") or n["sample_id"]) for n in notes}
    try:
        pairs = sorted((int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids)
    except ValueError:
        raise DataError("the input has a column uid that is not 32 hex digits; rename it") from None
    counts["images"] = counts["samples"] = len(pairs)
    buffer = io.BytesIO()
    np.save(buffer, np.array(pairs, dtype="u8,u8"), allow_pickle=False)
    with files.writing("uids.npy") as file:
        file.write(buffer.getvalue())


_WRITERS: dict[str, Callable[[Iterator[ExportSample], _Files, int], None]] = {
    "wds": _write_wds,
    "parquet": _write_parquet,
    "json": _write_json,
}
