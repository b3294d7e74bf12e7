"""Export the texts of a selection as a data set that training and other tools read directly.

The same selection gives the same bytes. `_SUCCESS`, which is written last, lists every file with its SHA-256.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blip.errors import DataError
from capfilt import export_embeddings
from capfilt.export_formats import write_wds, writer
from capfilt.export_samples import REENCODED, ExportSample, formats, samples
from capfilt.exported import BEGUN, COUNTED, MARKERS, OURS, WITH_IMAGES, count
from capfilt.run import Run
from capfilt.select.choose import kept_of, nothing_kept, read_account
from capfilt.settings import at_least
from capfilt.store.faults import fault_point
from capfilt.store.identity import differences
from capfilt.store.storage import Storage, open_storage

_VERSION = 2
"""Version of the formats: an older export is not continued."""
_READ_BY_ALL = ("jpg", "png", "webp")
"""Extensions that every reader of tar shards accepts, if all images have the same."""


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
    run: Run, selection: str, form: str, to: str, *, shard: int = 10_000, together: bool = False,
    reencode: str | None = None, by_format: bool = False, blind: bool = False, replace: bool = False,
    allow_empty: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a selection to a folder or object store; returns the manifest.

    One sample per kept text, or with `together` one per image with a list of texts. Images keep their bytes;
    `reencode` converts those of other formats to jpg or webp, `by_format` writes tar shards of each format to a folder
    of its own. `blind` tasks of Label Studio have no predictions. `replace` removes an older export there, whole or in
    part. The files are opened again and counted before `_SUCCESS` is written. ValueError if an option does not fit
    the format, if tar shards would hold images of several formats, if the folder holds anything else, which training
    would read as well, or if nothing is kept, unless `allow_empty`; DataError if an image is not the one that was
    scored, or if the files do not hold what is kept.
    """
    at_least(1, shard=shard)
    _check_options(form, together=together, reencode=reencode, by_format=by_format, blind=blind)
    account = read_account(run, selection)
    kept = sum(account["kept"].values())
    if not kept and not allow_empty:
        raise ValueError(nothing_kept(account))
    of_format = formats(run, selection) if form in WITH_IMAGES else {}
    if form == "wds" and not (reencode or by_format):
        _check_one_format(of_format)
    if form == "embeddings":
        export_embeddings.check_stored(run, selection)
    files = _Files(open_storage(to))
    about = {
        "version": _VERSION,
        "format": form,
        "selection": selection,
        "fingerprint": run.fingerprint,
        "scorer": run.config.scorer,
        "shard": shard,
        "together": together,
        "reencode": reencode,
        "by_format": by_format,
        "blind": blind,
        "selection_sha256": account["files"]["texts.parquet"],
    }
    _begin(files.storage, about, replace)
    counts = dict.fromkeys((*COUNTED, "reencoded"), 0)
    if form == "uids":
        _write_uids(run, selection, files, counts)
    elif form == "embeddings":
        total = export_embeddings.count_samples(run, selection, together)
        rows = samples(run, selection, together, with_images=False)
        export_embeddings.write(run, _counted(rows, counts), files, shard, total)
    elif by_format:
        for suffix in of_format:
            write_wds(_counted(samples(run, selection, together, only=suffix), counts), files, shard, f"{suffix}/")
    else:
        write = writer(form, together=together, selection=selection, blind=blind)
        write(_counted(samples(run, selection, together, reencode=reencode), counts), files, shard)
    if counts["pairs"] != kept:
        raise DataError(f"{counts['pairs']} texts were exported and {kept} are kept: run `capfilt verify`")
    in_files = count(files.storage, form, files.written)
    if different := differences({name: counts[name] for name in in_files}, in_files):
        raise DataError(f"{files.storage.root} does not hold what was written ({'; '.join(different)}): export again")
    manifest = {**about, **counts, "formats": of_format, "files": files.written}
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    files.storage.write("_SUCCESS", content)
    files.storage.remove(BEGUN)
    where = json.dumps({"to": _seen_from(run.storage, files.storage), **manifest})
    run.storage.write(f"exports/{selection}-{form}.json", where.encode())
    return manifest


def _check_options(form: str, *, together: bool, reencode: str | None, by_format: bool, blind: bool) -> None:
    """Raise ValueError for options that do not fit the format or each other."""
    if reencode and reencode not in REENCODED:
        raise ValueError(f"images are re-encoded to {' or '.join(REENCODED)}, got {reencode!r}")
    if reencode and form not in WITH_IMAGES:
        raise ValueError(f"--reencode is for formats with images, and {form} has none")
    if by_format and form != "wds":
        raise ValueError(f"--by-format is for tar shards (--format wds), got --format {form}")
    if by_format and reencode:
        raise ValueError("give --reencode or --by-format: re-encoded images have one format")
    if blind and form != "labelstudio":
        raise ValueError(f"--blind is for --format labelstudio, got --format {form}")
    if together and form == "labelstudio":
        raise ValueError("--format labelstudio has a task for each text: leave --together out")


def _check_one_format(of_format: dict[str, int]) -> None:
    """Raise ValueError unless the images of tar shards have one format that all readers accept."""
    if len(of_format) > 1 or of_format.keys() - set(_READ_BY_ALL):
        counts = ", ".join(f"{n:,} {suffix}" for suffix, n in of_format.items())
        raise ValueError(
            f"the kept images are {counts}, but readers of tar shards expect one of {', '.join(_READ_BY_ALL)} in a "
            "whole data set: give --reencode jpg (or webp), or --by-format for a folder of shards per format"
        )


def _seen_from(run: Storage, to: Storage) -> str:
    """Return the address of an export, relative to the run if it is inside the run's folder and moves with it."""
    return to.address.removeprefix(f"{run.address.rstrip('/')}/")


def exported_to(run: Storage, noted: str) -> Storage:
    """Open the export whose address `_seen_from` returned."""
    return open_storage(noted if "://" in noted or os.path.isabs(noted) else f"{run.address.rstrip('/')}/{noted}")


def read_manifest(storage: Storage, name: str = "_SUCCESS") -> dict[str, Any]:
    """Read the manifest of an export. FileNotFoundError if there is none; DataError if it is not as it was written."""
    content = storage.read(name)
    try:
        manifest = json.loads(content)
        hashes = [facts["sha256"] for facts in manifest["files"].values()]
        names = [manifest[key] for key in ("selection", "format", "selection_sha256")]
        if not all(isinstance(text, str) for text in hashes + names) or not isinstance(manifest["pairs"], int):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{storage.root}/{name} is damaged; export again") from None
    return manifest


def read_note(run: Run, name: str) -> dict[str, Any]:
    """Read what a run has recorded of an export, its manifest and address. DataError if it is not as it was written."""
    note = read_manifest(run.storage, name)
    if not isinstance(note.get("to"), str):
        raise DataError(f"{run.storage.root}/{name} is damaged; export again")
    return note


def _begin(storage: Storage, about: dict[str, Any], replace: bool) -> None:
    """Mark the export as begun. ValueError unless the folder is empty or holds this very export, whole or in part."""
    marker = next((name for name in MARKERS if storage.exists(name)), None)
    if marker is None and (there := storage.entries()):
        raise ValueError(f"{storage.root} is not empty ({', '.join(there[:3])}): give another --to")
    if marker is not None:
        before = _read_marker(storage, marker)
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


def _read_marker(storage: Storage, name: str) -> dict[str, Any]:
    """Read the settings of the export that is there. ValueError if another program wrote the marker, as Hadoop does."""
    try:
        before = json.loads(storage.read(name))
        before["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{storage.root} holds a {name} that no export wrote: give another --to") from None
    return before


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
        counts["reencoded"] += sample.first and sample.reencoded
        yield sample


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
