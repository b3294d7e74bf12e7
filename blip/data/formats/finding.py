"""Files and formats that a user's path means: the one rule of training and CapFilt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blip.data.formats.folder import ImagesWithSidecars, images_beside, metadata
from blip.data.formats.remote import RemoteFile, find_remote, is_address
from blip.data.paths import alternatives, check_spec, is_pattern, present
from blip.data.settings import SourceConfig
from blip.errors import DataError, without_credentials

_FORMATS = dict.fromkeys((".json", ".jsonl", ".ndjson", ".csv", ".tsv"), "json")
_FORMATS |= {".parquet": "parquet", ".tar": "tar"}
_SHARDS = {"tar": ("tar",), "parquet": ("parquet",), "json": ("jsonl", "ndjson")}
"""Format -> endings of its shards in a folder."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_EXPECTED = (
    f"expected {', '.join(_FORMATS)} files, a folder of shards (.tar, .parquet, .jsonl, .ndjson), or one of images "
    "with metadata.jsonl or a .txt beside each"
)


class SourceFile(NamedTuple):
    """A file, or the folder of a saved data set."""

    format: str
    """json, imagefolder (its metadata, or a folder of images with side-cars), files (img2dataset's parquet), parquet,
    tar or dataset.
    """
    path: Path | RemoteFile
    of_split: bool = False
    """Whether the whole file belongs to the requested split, because it is in a folder of that name."""


def find(spec: str, format: str = "auto", split: str | None = None, remote: bool = False) -> list[SourceFile]:
    """Find the files of a path, a glob, a range {000..012}, a list {a,b} or a::b, a file URL or a folder.

    With `remote`, these may be addresses, too. A name that exists literally is not treated as a pattern. DataError for
    a file that does not exist, has an unknown format, or is named more than once.
    """
    files = [one for name in alternatives(spec) for one in _find(name, format, split, remote)]
    twice = next((path for path, times in Counter(one.path for one in files).items() if times > 1), None)
    if twice is not None:
        raise DataError(f"source {without_credentials(spec)} names {twice} more than once")
    return files


def _find(name: str, format: str, split: str | None, remote: bool) -> list[SourceFile]:
    if not is_address(name):
        return find_one(check_spec(name), "source", format, split)
    if not remote:
        raise DataError(
            f"source {without_credentials(name)!r}: only local files are read; download it first, mount it, or set "
            "data.remote to true (blip-eval: --remote true) to read it where it is"
        )
    return [_file(file, "source", format) for file in find_remote(name, "source")]


def find_one(name: str, what: str, format: str = "auto", split: str | None = None) -> list[SourceFile]:
    """Find the files of one path or glob; errors call it a `what` (source, input)."""
    paths = [Path(path) for path in present(name, what)]
    return [
        one
        for path in paths
        for one in (_in(path, what, format, split) if path.is_dir() else [_file(path, what, format)])
    ]


def _file(path: Path | RemoteFile, what: str, format: str) -> SourceFile:
    if format != "auto":
        return SourceFile(format, path)
    return SourceFile(file_format(path, what), path)


def file_format(path: Path | RemoteFile, what: str) -> str:
    """Format of a file by its ending. DataError if that is not a supported one."""
    if path.name.endswith(_COMPRESSED):
        raise DataError(f"{path} is compressed, which leaves no way to a single sample: unpack it to a plain .tar")
    known = _FORMATS.get(path.suffix.lower())
    if known is None:
        raise _unknown(f"{what} {path}", f"files ending in {path.suffix or 'nothing'}")
    return known


def _unknown(where: str, why: str) -> DataError:
    return DataError(
        f"{where}: cannot tell its format ({why}); {_EXPECTED}, or set format (dataset for a name on the hub)"
    )


def _in(folder: Path, what: str, format: str, split: str | None) -> list[SourceFile]:
    """A saved data set, an image folder, img2dataset's output, or shards of one format."""
    if format in ("auto", "dataset") and is_dataset(folder):
        return [SourceFile("dataset", folder)]
    if format in ("auto", "imagefolder"):
        chosen = metadata(folder / split) if split else []
        if not chosen and split and _has_sidecars(folder / split):
            chosen = [folder / split]
        if chosen:
            return [SourceFile("imagefolder", file, True) for file in chosen]
    by_format = {
        kind: sorted(file for suffix in ends for file in folder.glob(f"*.{suffix}")) for kind, ends in _SHARDS.items()
    }
    by_format["imagefolder"] = metadata(folder)
    if not any(by_format.values()) and format in ("auto", "imagefolder") and _has_sidecars(folder):
        return [SourceFile("imagefolder", folder)]
    if format != "auto":
        return _all(folder, what, format, by_format.get(format, []))
    tars = {file.stem for file in by_format["tar"]}
    by_format["parquet"] = [file for file in by_format["parquet"] if file.stem not in tars]  # img2dataset writes both
    kinds = [kind for kind in ("tar", "parquet") if by_format[kind]]
    kinds += ["imagefolder"] * bool(metadata(folder, within=bool(not kinds)))
    if len(kinds) > 1:
        suffixes = sorted({file.suffix for kind in kinds for file in by_format[kind]})
        raise _unknown(f"{what} {folder}", f"files ending in {', '.join(suffixes)}")
    kind = kinds[0] if kinds else "json"
    return _all(folder, what, kind, by_format[kind])


def _all(folder: Path, what: str, kind: str, files: Sequence[Path]) -> list[SourceFile]:
    if kind == "imagefolder" and not files:
        raise DataError(
            f"{what} {folder}: no metadata.jsonl or metadata.csv with file_name and a caption column, and no image "
            "with a .txt or .caption beside it"
        )
    if not files:
        raise DataError(
            f"{what} {folder}: a folder without shards (.tar, .parquet, .jsonl, .ndjson), metadata.jsonl, "
            "metadata.csv, images with a .txt or .caption beside them, or a saved data set"
        )
    return [SourceFile("files" if kind == "parquet" and images_beside(f).is_dir() else kind, f) for f in files]


def _has_sidecars(folder: Path) -> bool:
    return folder.is_dir() and bool(ImagesWithSidecars(folder).sidecars)


def is_dataset(folder: str | Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any(Path(folder, name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def format_of(config: SourceConfig, remote: bool = False) -> str:
    """The format that `auto` chooses for this path. Raises DataError if it is unclear."""
    if config.format != "auto":
        return config.format
    if not is_address(config.path):
        path = Path(check_spec(config.path))
        if not (path.exists() or path.suffix or is_pattern(config.path)):
            raise _unknown(f"source {config.path}", "no such file")
    files = find(config.path, split=config.split, remote=remote)
    formats = {one.format for one in files}
    if len(formats) != 1:
        suffixes = ", ".join(sorted({one.path.suffix or "nothing" for one in files}))
        raise _unknown(f"source {without_credentials(config.path)}", f"files ending in {suffixes}")
    return formats.pop()


def shard_files(path: str, kind: str, remote: bool = False) -> list[Path | RemoteFile]:
    """The files of a path, where a folder means its files of one format."""
    return [one.path for one in find(path, kind, remote=remote)]
