"""Formats of an export with images: each writes samples into files, some tens of thousands of samples a file."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby, islice
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from blip.data.formats.tars import EXPORTED
from capfilt.export_samples import ExportSample
from capfilt.store.identity import text_id

_GROUP = 256
"""Rows per row group of a parquet file."""
_OWN_FIELDS = ("sample_id", "key", "url", "width", "height")
"""Facts with a field of their own in a tar's JSON members."""
MATCH, NO_MATCH = "match", "no match"
"""Choices of Label Studio's tasks."""
LOCAL_FILES = "/data/local-files/?d="
"""Start of the addresses by which Label Studio serves files of its document root."""


class Files(Protocol):
    """Files of an export being written."""

    def writing(self, name: str) -> AbstractContextManager[IO[bytes]]: ...


def sharded(samples: Iterator[ExportSample], size: int) -> Iterator[tuple[int, Iterator[ExportSample]]]:
    """Group samples by the number of their file."""
    return groupby(samples, key=lambda sample: int(sample.name) // size)


# webdataset -----------------------------------------------------------------------------------------------------------


def write_wds(samples: Iterator[ExportSample], files: Files, size: int, folder: str = "") -> None:
    """Write tar shards, each sample an image, a .txt with its first text, and a .json of the same types everywhere."""
    for number, group in sharded(samples, size):
        with (
            files.writing(f"{folder}{number:05d}.tar") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for sample in group:
                _add(tar, f"{sample.name}.{sample.suffix}", sample.image)
                _add(tar, f"{sample.name}.txt", sample.captions[0].encode())
                _add(tar, f"{sample.name}.json", json.dumps(_fields(sample)).encode())


def _fields(sample: ExportSample) -> dict[str, Any]:
    """Return the JSON member of a sample: nothing null, no empty list, and all that may vary in one string.

    `datasets` takes the types of the first five samples for those of all.
    """
    facts = dict(sample.facts)
    fields = {name: facts.pop(name) for name in _OWN_FIELDS}
    return {
        "caption": sample.captions[0],
        "captions": sample.captions,
        "sources": sample.sources,
        "scores": sample.scores,
        **fields,
        "url": fields["url"] or "",
        "facts": json.dumps(EXPORTED | facts),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# Parquet --------------------------------------------------------------------------------------------------------------


def _write_parquet(samples: Iterator[ExportSample], files: Files, size: int) -> None:
    schema = _hosted_schema()
    for number, group in sharded(samples, size):
        with files.writing(f"{number:05d}.parquet") as file, pq.ParquetWriter(file, schema) as writer:
            rows = iter(group)
            while some := [_row(sample) for sample in islice(rows, _GROUP)]:
                writer.write_table(pa.Table.from_pylist(some, schema))


def _row(sample: ExportSample) -> dict[str, Any]:
    return {
        "image": {"bytes": sample.image, "path": f"{sample.name}.{sample.suffix}"},
        "caption": sample.captions,
        "sample_id": sample.facts["sample_id"],
        "source": sample.sources,
        "score": sample.scores,
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


# Lists with image files -----------------------------------------------------------------------------------------------


def image_file(sample: ExportSample, files: Files, size: int) -> str:
    """Write the image of a sample, each image once, under images/; returns its name."""
    name = f"images/{int(sample.image_name) // size:05d}/{sample.image_name}.{sample.suffix}"
    if sample.first:
        with files.writing(name) as file:
            file.write(sample.image)
    return name


class _List:
    """A JSON list that is written entry by entry."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, b"[\n"

    def __enter__(self) -> _List:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.write(b"[]\n" if self._start == b"[\n" else b"\n]\n")

    def add(self, entry: dict[str, Any]) -> None:
        self._file.write(self._start + json.dumps(entry).encode())
        self._start = b",\n"


def _write_json(samples: Iterator[ExportSample], files: Files, size: int, together: bool) -> None:
    """Write captions.json with one {image, caption} per sample, and metadata.jsonl, which `imagefolder` reads.

    There `text` is a text in every row or, with `together`, a list in every row.
    """
    with ExitStack() as stack:
        listing = stack.enter_context(_List(stack.enter_context(files.writing("captions.json"))))
        metadata = stack.enter_context(files.writing("metadata.jsonl"))
        for sample in samples:
            name, captions = image_file(sample, files, size), sample.captions
            listing.add({"image": name, "caption": captions if len(captions) > 1 else captions[0]})
            row = {"file_name": name, "text": captions if together else captions[0]}
            metadata.write(json.dumps(row).encode() + b"\n")


# Annotation tools -----------------------------------------------------------------------------------------------------

_CONFIG = f"""\
<View>
  <Image name="image" value="$image"/>
  <Text name="text" value="$text"/>
  <Choices name="match" toName="image" choice="single" required="true">
    <Choice value="{MATCH}" hotkey="y"/>
    <Choice value="{NO_MATCH}" hotkey="n"/>
  </Choices>
</View>
"""


def _write_labelstudio(samples: Iterator[ExportSample], files: Files, size: int, selection: str, blind: bool) -> None:
    """Write tasks.json with one task per text, config.xml, and images that Label Studio serves as local files.

    An id is that of the audit's sheet, which does not reveal the source of the text. `blind` omits the predictions.
    """
    with files.writing("config.xml") as file:
        file.write(_CONFIG.encode())
    with files.writing("tasks.json") as file, _List(file) as tasks:
        for sample in samples:
            image = LOCAL_FILES + image_file(sample, files, size)
            source = "syn" if sample.sources[0] == "syn" else "web"  # "human" is what a selection calls web texts
            mark = text_id(sample.facts["sample_id"], source, sample.text_index)
            task: dict[str, Any] = {"data": {"id": mark, "image": image, "text": sample.captions[0]}}
            if not blind:
                result = {"from_name": "match", "to_name": "image", "type": "choices", "value": {"choices": [MATCH]}}
                prediction = {"model_version": f"capfilt {selection}", "score": sample.scores[0], "result": [result]}
                task["predictions"] = [prediction]
            tasks.add(task)


LOADER = '''\
"""Load this folder into FiftyOne: python load.py [NAME OF THE DATA SET]."""

import json
import sys
from pathlib import Path

import fiftyone as fo

folder = Path(__file__).resolve().parent
samples = []
for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
    fields = json.loads(line)
    sample = fo.Sample(filepath=str(folder / fields.pop("filepath")), tags=fields.pop("tags"))
    sample["text"] = fo.Classification(label=fields["caption"], confidence=fields["score"])
    for name, value in fields.items():
        sample[name] = value
    samples.append(sample)
dataset = fo.Dataset(sys.argv[1] if len(sys.argv) > 1 else folder.name, persistent=True)
dataset.add_samples(samples)
print(f"{len(samples)} samples: fiftyone app launch {dataset.name}")
'''


def _write_fiftyone(samples: Iterator[ExportSample], files: Files, size: int) -> None:
    """Write samples.jsonl of plain fields, load.py, which makes a FiftyOne data set of it, and the images."""
    with files.writing("load.py") as file:
        file.write(LOADER.encode())
    with files.writing("samples.jsonl") as file:
        for sample in samples:
            fields = {
                "filepath": image_file(sample, files, size),
                "tags": sorted(set(sample.sources)),
                "caption": sample.captions[0],
                "captions": sample.captions,
                "score": sample.scores[0],
                "scores": sample.scores,
                **{name: sample.facts[name] for name in _OWN_FIELDS},
                "url": sample.facts["url"] or "",
                "source_uri": sample.facts["source_uri"],
            }
            file.write(json.dumps(fields).encode() + b"\n")


def writer(form: str, *, together: bool, selection: str, blind: bool) -> Callable[..., None]:
    """Return the function (samples, files, size) that writes a format."""
    return {
        "wds": write_wds,
        "parquet": _write_parquet,
        "json": lambda *work: _write_json(*work, together),
        "labelstudio": lambda *work: _write_labelstudio(*work, selection, blind),
        "fiftyone": _write_fiftyone,
    }[form]
