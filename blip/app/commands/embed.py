"""`blip embed`: write embeddings of images, and of their texts, as files that other programs read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip.app.commands.shared import ModelOptions, at_least
from blip.app.exit import SOME_FAILED
from blip.errors import BadSample, DataError
from blip.options import argument, option

if TYPE_CHECKING:
    from blip.app.answers import Answers
    from blip.app.loaded import Loaded
    from blip.data.embeddings import Names
    from blip.data.image_files import ImageFile

EXAMPLE = """examples:
  blip embed photos/ --to embeddings --model runs/retrieval/model
  blip embed photos/ --to embeddings --texts photos/metadata.jsonl --model runs/retrieval/model

Writes the layout of clip-retrieval: img_emb/img_emb_0.npy and, with --texts, text_emb/text_emb_0.npy (float16, each row
of length 1), and metadata/metadata_0.parquet (image_path, caption, sha256). Row i of the files of one number is the
same image. The same command continues an interrupted one. Exit status: 0, or 1 if some images could not be used, or 2
for wrong use."""

_RECORD = "embed.json"
_FORMAT = "openblip embeddings"


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(ModelOptions):
    """Write embeddings of images as files."""

    images: list[str] = argument("IMAGE")
    """Image, folder of images (including subfolders and linked folders) or quoted glob"""
    to: str = option(metavar="DIR")
    """Folder to write to: empty, or with embeddings that the same command has begun"""
    texts: str | None = option(None, metavar="FILE")
    """Texts to embed with the images: JSON, JSON lines or CSV with the columns image (or file_name), a path relative to
    the file's folder, and caption (or text); of several texts of an image the first counts"""
    shard: int = option(10_000, metavar="N")
    """Number of images per file"""
    batch: int = option(16, metavar="N")
    """Number of images per batch"""

    def __post_init__(self) -> None:
        at_least(1, shard=self.shard, batch=self.batch)


def run(chosen: EmbedOptions) -> int:
    """Embed the images that the options name; returns the exit status."""
    from blip.data.image_files import find

    _check_folder(chosen.to)
    inputs = find(chosen.images)
    captions = None if chosen.texts is None else _captions(chosen.texts, inputs.paths)

    # After the checks that need no torch, so that their errors come at once.
    from blip import files
    from blip.app.answers import Answers
    from blip.app.loaded import load
    from blip.data import embeddings

    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer, batch=chosen.batch)
    record = {**loaded.options(chosen.model), "shard": chosen.shard, "images": _identity(inputs.paths),
              "texts": chosen.texts and hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16]}  # fmt: skip
    _begin(chosen.to, record)
    files.sweep(Path(chosen.to), inside=True)
    parts = [inputs.paths[at : at + chosen.shard] for at in range(0, len(inputs.paths), chosen.shard)]
    names = [embeddings.names(number, len(parts)) for number in range(len(parts))]
    to_do = [number for number in range(len(parts)) if not Path(chosen.to, names[number].metadata).exists()]
    left = [path for number in to_do for path in parts[number]]
    with Answers(None, inputs._replace(paths=left)) as answers:
        for number in to_do:
            rows = _embedded(loaded, parts[number], captions, answers)
            if rows:
                _write(chosen.to, names[number], rows)
    counts = [_rows(Path(chosen.to, name.metadata)) for name in names]
    print(f"{chosen.to}: {sum(counts):,} embeddings in {sum(map(bool, counts)):,} files")
    return SOME_FAILED if sum(counts) < inputs.total else 0


# Input ----------------------------------------------------------------------------------------------------------------


def _captions(file: str, paths: Sequence[str]) -> dict[str, str]:
    """Read the text of each image that has one, by path. ValueError if none has."""
    from blip.data.formats import table
    from blip.data.formats.rows import Columns

    if not os.path.isfile(file):
        raise ValueError(f"--texts {file}: no such file")
    folder, texts = os.path.dirname(file), {}
    for row in table.rows(Path(file), Columns()):
        if isinstance(row.image, str) and isinstance(row.captions, list):
            texts.setdefault(_place(os.path.join(folder, row.image)), row.captions[0])
    captions = {path: texts[_place(path)] for path in paths if _place(path) in texts}
    if not captions:
        first = next(iter(texts), "none")
        raise ValueError(f"--texts {file} has no text of any of the {len(paths)} images; its first path is {first}")
    return captions


def _place(path: str) -> str:
    """Return the absolute path of a file, links among its folders resolved, itself not."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _identity(paths: Sequence[str]) -> str:
    """Hash the names, sizes and times of files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            info = os.stat(path)
            state = f"{info.st_size} {info.st_mtime_ns}"
        except OSError:
            state = "-"
        digest.update(f"{state} {len(path)} {path}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


# Output ---------------------------------------------------------------------------------------------------------------


def _check_folder(to: str) -> None:
    """Raise ValueError if a folder holds anything but embeddings of this command."""
    from blip.files import TEMPORARY

    if os.path.lexists(to) and not os.path.isdir(to):
        raise ValueError(f"--to {to} is a file; give the name of a folder")
    there = sorted(name for name in os.listdir(to) if not name.startswith(TEMPORARY)) if os.path.isdir(to) else []
    if there and _RECORD not in there:
        raise ValueError(f"--to {to} is not empty ({', '.join(there[:3])}): give another folder")


def _begin(to: str, record: dict[str, Any]) -> None:
    """Record what embeddings depend on. ValueError if the folder has those of other images, texts or options."""
    path = Path(to, _RECORD)
    try:
        before = json.loads(path.read_bytes())
        if before.pop("format") != _FORMAT:
            raise ValueError(path)
    except FileNotFoundError:
        _replace(path, json.dumps({"format": _FORMAT, **record}, indent=1).encode() + b"\n")
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a record of embeddings: give another --to") from None
    # The model's folder may have moved; its weights are compared instead.
    if other := [name for name in record if name != "model" and before.get(name) != record[name]]:
        raise ValueError(
            f"--to {to} has embeddings made with other {' and '.join(other)}: give another folder, or delete it"
        )


def _replace(path: Path, content: bytes) -> None:
    """Write a file, all or nothing. OSError that says what to do."""
    from blip import files

    unfinished = files.partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(unfinished, content)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(files.not_written(path, "give another --to, then the same command", error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _embedded(
    loaded: Loaded, paths: Sequence[str], captions: dict[str, str] | None, answers: Answers
) -> list[tuple[ImageFile, str, Any, Any]]:
    """Embed images, and their texts if there are some: (file, caption, image vector, text vector) of each."""
    import torch

    from blip.data.image_files import read_images

    rows: list[tuple[ImageFile, str, Any, Any]] = []
    usable = [path for path in paths if _has_words(path, captions, answers)]
    for files in read_images(usable, loaded.transform, loaded.batch):
        if read := answers.readable(files):
            texts = [captions[image.path] if captions is not None else "" for image in read]
            with loaded.computing():
                vectors = loaded.embed_image(torch.stack([image.pixels for image in read])).float().cpu().numpy()
                of_texts = (
                    loaded.embed_text(texts).float().cpu().numpy() if captions is not None else [None] * len(read)
                )
            named = [image._replace(pixels=None) for image in read]
            rows += zip(named, texts, vectors, of_texts, strict=True)
        answers.advance(len(files))
    return rows


def _has_words(path: str, captions: dict[str, str] | None, answers: Answers) -> bool:
    """Tell whether an image has a text where it needs one; report it as a failure if not."""
    from blip.text import clean_caption

    if captions is None:
        return True
    reason = "has no text in --texts"
    if path in captions:
        try:
            clean_caption(captions[path], 1)
            return True
        except BadSample as error:
            reason = f"its text {captions[path][:60]!r} cannot be used: {error.reason}"
    answers.failure(path, reason)
    answers.advance(1)
    return False


def _write(to: str, names: Names, rows: list[tuple[ImageFile, str, Any, Any]]) -> None:
    """Write the files of one number, the metadata last, by which a number counts as done."""
    import numpy as np
    import pyarrow as pa

    from blip.data import embeddings

    images, captions, vectors, of_texts = zip(*rows, strict=True)
    _replace(Path(to, names.image), embeddings.vectors(np.stack(vectors)))
    columns = {"image_path": [_storable(image.path) for image in images]}
    if of_texts[0] is not None:
        _replace(Path(to, names.text), embeddings.vectors(np.stack(of_texts)))
        columns["caption"] = list(captions)
    columns["sha256"] = [image.digest for image in images]
    _replace(Path(to, names.metadata), embeddings.table(columns, pa.schema([(name, pa.string()) for name in columns])))


def _storable(path: str) -> str:
    """Return a path as text that parquet can hold."""
    return path.encode("utf-8", "backslashreplace").decode()


def _rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except FileNotFoundError:
        return 0
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it and give the same command again") from None
