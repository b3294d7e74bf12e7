"""The plan: which rows there are and in which parts they are scored. Made once, without a GPU, and never changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from blip.data.formats.splits import check_split, refuse_split
from blip.data.paths import alternatives, is_plain_path, local, present
from blip.errors import DataError
from capfilt.readers import hosted, listed, parquet, tar
from capfilt.readers.rows import RowGroups, Source, content_of, is_remote, stat_of
from capfilt.run import PLAN, Part, Run
from capfilt.settings import ReadConfig, ScoreConfig, at_least, decided, has_gpu, of_record, resolve, to_record
from capfilt.store import parts as part_files
from capfilt.store.identity import differences, fingerprint, part_id
from capfilt.store.storage import Local, Storage, open_storage

_ENDINGS = {".tar": "tar", ".parquet": "parquet", ".json": "listed", ".jsonl": "listed", ".ndjson": "listed",
            ".csv": "listed", ".tsv": "listed"}  # fmt: skip
_METADATA = ("metadata.jsonl", "metadata.csv", "*/metadata.jsonl", "*/metadata.csv")
_GROUP = 1024
"""Rows of an index that are read together."""


# Finding files --------------------------------------------------------------------------------------------------------


def find(spec: str, split: str | None = None) -> list[tuple[str, str]]:
    """The (kind, path) that an input means, in a fixed order. DataError for what is not there or may not be read.

    Of an image folder with a folder for each split, that of `split`.
    """
    if spec.startswith(hosted.HUB):
        return [("hosted", spec)]
    return [one for name in alternatives(spec) for one in _find_one(name, split)]


def _find_one(name: str, split: str | None) -> list[tuple[str, str]]:
    """What one path or glob means."""
    if is_remote(name):
        return _remote(name)
    if not is_plain_path(name):
        raise DataError(f"input {name!r}: only files of this machine or of an object store are read; download it first")
    paths = present(os.path.abspath(name), "input")
    return [one for path in paths for one in (_folder(path, split) if os.path.isdir(path) else [(_kind(path), path)])]


def _find_all(specs: Sequence[str], split: str | None) -> list[tuple[str, str]]:
    """What all inputs mean. DataError if a file is among them twice."""
    files = [one for spec in specs for one in find(spec, split)]
    (path, times), *_ = Counter(path for _, path in files).most_common(1) or [("", 0)]
    if times > 1:
        raise DataError(f"input {path} is given twice")
    return files


def _kind(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    if path.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        raise DataError(f"{path} is compressed, which leaves no way to a single sample: unpack it to a plain .tar")
    if ending not in _ENDINGS:
        raise DataError(f"{path}: expected a file ending in {', '.join(_ENDINGS)}, or a folder of them")
    return _ENDINGS[ending]


def _folder(path: str, split: str | None) -> list[tuple[str, str]]:
    """A saved data set, img2dataset's output, an image folder, or shards."""
    here = Path(path)
    if hosted.is_dataset(path):
        return [("hosted", path)]
    chosen = _lists(here / split, _METADATA) if split else []
    if chosen:
        return [("of split", one) for one in chosen]
    tars = sorted(map(str, here.glob("*.tar")))
    if tars:
        return [("tar", p) for p in tars]
    tables = sorted(map(str, here.glob("*.parquet")))
    if tables:
        return [("files" if os.path.isdir(p.removesuffix(".parquet")) else "parquet", p) for p in tables]
    lists = _lists(here, (*_METADATA, "*.jsonl"))
    if lists:
        return [("listed", p) for p in lists]
    raise DataError(
        f"input {path}: a folder without shards (.tar, .parquet, .jsonl), metadata.jsonl or a saved data set"
    )


def _lists(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files of the first pattern that has any."""
    return next(filter(None, (sorted(map(str, folder.glob(pattern))) for pattern in patterns)), [])


def _remote(spec: str) -> list[tuple[str, str]]:
    import fsspec

    files, inside = fsspec.core.url_to_fs(spec)
    scheme = spec.split("://")[0]
    found = sorted(files.glob(inside)) if "*" in inside else [inside] if files.exists(inside) else []
    if not found:
        raise DataError(f"input {spec}: no such object")
    kinds = [(_kind(p), f"{scheme}://{p.lstrip('/')}") for p in found]
    if any(kind == "listed" for kind, _ in kinds):
        raise DataError(f"input {spec}: only tar and parquet are read from an object store; copy lists here")
    return kinds


# Sources --------------------------------------------------------------------------------------------------------------


def _relpath(path: str, root: str) -> str:
    """A path under the root of all input; what is not, as a data set on the hub, keeps its name."""
    if path.startswith(hosted.HUB) or is_remote(path):
        return path.removeprefix(f"{root}/") if root else path
    return path if is_remote(root) else os.path.relpath(path, root).replace(os.sep, "/")


def _root(paths: Sequence[str]) -> str:
    """The folder that all input is in, of this machine or of an object store; of this machine's where there is both."""
    named = [p for p in paths if not p.startswith(hosted.HUB)]
    local = [os.path.dirname(p) for p in named if not is_remote(p)]
    stores = {p.split("://")[0] for p in named if is_remote(p)}
    if local or len(stores) != 1:
        return os.path.commonpath(local) if local else ""
    inside = [os.path.dirname(p.split("://")[1]) for p in named]
    return f"{stores.pop()}://{os.path.commonpath(inside)}"


def describe(
    kind: str, path: str, root: str, config: ReadConfig, storage: Storage, seen: Counter[str] | None = None
) -> Source:
    """What a file is and how many rows it has; its index of rows is written where the format needs one.

    `seen` counts the splits that lists have.
    """
    relpath = _relpath(path, root)
    if kind == "hosted":
        rows, size, content = hosted.describe(path, config)
        return Source("hosted", path, relpath, size, 0.0, content, rows)
    if kind in ("parquet", "tar", "files"):
        refuse_split(config.split, path, f"{'parquet' if kind == 'files' else kind} files")
    size, mtime, _ = stat_of(path)
    content = content_of(path)
    if kind == "parquet":
        file = parquet.open_parquet(path)
        parquet.checked_columns(file.schema_arrow, config, path)
        return Source("parquet", path, relpath, size, mtime, content, file.metadata.num_rows, declared=_declared(path))
    builders: dict[str, Callable[[], tuple[pa.Table, str | None, list[str]]]] = {
        "tar": lambda: tar.index(path),
        "listed": lambda: listed.index_json(path, config, seen),
        "of split": lambda: listed.index_json(path, dataclasses.replace(config, split=None)),
        "files": lambda: listed.index_files(path, config),
    }
    table, damage, notes = builders[kind]()
    if kind == "tar":
        tar.check_column(path, table, config)
    name = f"plan/index/{hashlib.sha256(relpath.encode()).hexdigest()[:16]}-{content}.parquet"
    storage.write(name, part_files.encode(table, {"source": relpath}, _GROUP))
    declared = _declared(path)
    if declared is not None and declared > len(table):
        damage = f"{damage or 'samples are missing'} (readable {len(table)}, declared {declared} in stats.json)"
    kind = "tar" if kind == "tar" else "listed"
    return Source(kind, path, relpath, size, mtime, content, len(table), name, damage, declared, tuple(notes))


def _declared(path: str) -> int | None:
    """Samples that img2dataset counted when it wrote a shard."""
    stats = os.path.splitext(path)[0] + "_stats.json"
    if is_remote(path) or not os.path.isfile(stats):
        return None
    try:
        value = json.loads(Path(stats).read_bytes())["successes"]
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return value if isinstance(value, int) else None


def open_index(storage: Storage, source: Source) -> RowGroups:
    """The index of a source's rows."""
    assert source.index is not None
    if isinstance(storage, Local):
        return RowGroups(str(storage.path(source.index)))
    import io

    return RowGroups(io.BytesIO(storage.read(source.index)))


# The plan -------------------------------------------------------------------------------------------------------------


def auto_part_size() -> int:
    """Rows that take some 30 to 120 seconds: 1024 with a GPU, 64 without."""
    return 1024 if has_gpu() else 64


def make(out: str, config: ScoreConfig, reading: ReadConfig, part_size: int | None = None) -> Run:
    """Freeze a plan into a folder or object store, or return the one that is there if it is the same.

    ValueError lists the differences if it is not; nothing is touched then. DataError if there is nothing to read.
    """
    at_least(1, part_size=part_size)
    storage = open_storage(out)
    planned = Run.open(out) if storage.exists("job.json") else None
    config = decided(config, planned and planned.config)
    resolved, reading = resolve(config), anchored(reading)
    files = _find_all(reading.inputs, reading.split)
    if planned:
        return _same(planned, resolved, reading, part_size, [path for _, path in files])
    others = [name for name in storage.entries() if name != "plan"]  # where a plan was killed, there is that
    if others:
        raise DataError(f"{out} is not empty ({', '.join(others[:3])}) and holds no run: give another --out")
    if not files:
        raise DataError("no input: give --input with files, folders or hf:NAME")
    root = _root([path for _, path in files])
    part_size = part_size or (auto_part_size() if config.scorer == "blip" else 1024)
    seen: Counter[str] = Counter()
    sources = _describe_all(files, root, reading, storage, seen)
    if any(kind == "listed" for kind, _ in files):
        check_split(reading.split, ", ".join(reading.inputs), seen)
    if not sum(s.rows for s in sources):
        reasons = (f"{s.path}: {reason}" for s in sources for reason in (s.damage, *s.notes) if reason)
        raise DataError(f"no rows to score: {next(reasons, 'the files hold no samples')}")
    job = {
        "version": 1,
        "fingerprint": fingerprint(resolved),
        "part_size": part_size,
        "config": resolved,
        "settings": to_record(config),
        "reading": dataclasses.asdict(reading),
        "root": root,
        "inputs": [dataclasses.asdict(s) for s in sources],
    }
    write_parts(storage, 0, sources, part_size, job["fingerprint"])
    storage.write("job.json", (json.dumps(job, indent=1) + "\n").encode())
    return Run.open(out)


def anchored(reading: ReadConfig) -> ReadConfig:
    """The settings with an image root that means the same from every folder that a command is given in."""
    if reading.image_root is None:
        return reading
    return dataclasses.replace(reading, image_root=os.path.abspath(os.path.expanduser(local(reading.image_root))))


def _describe_all(
    files: Sequence[tuple[str, str]], root: str, reading: ReadConfig, storage: Storage, seen: Counter[str] | None = None
) -> list[Source]:
    counts = [Counter() for _ in files]  # one each, as threads count
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one, mine: describe(*one, root, reading, storage, mine), files, counts))
    for mine in counts if seen is not None else ():
        seen.update(mine)
    return found


def write_parts(storage: Storage, number: int, sources: Sequence[Source], size: int, mark: str) -> None:
    """Write plan/NUMBER.parquet with the parts of some sources, `mark` being the run's fingerprint."""
    rows = [
        Part(part_id(s.relpath, s.size, s.content, lo, min(lo + size, s.rows), mark), s.relpath, lo,
             min(lo + size, s.rows))
        for s in sources
        for lo in range(0, s.rows, size)
    ]  # fmt: skip
    columns = [[p.pid for p in rows], [p.source for p in rows], [p.lo for p in rows], [p.hi for p in rows],
               [p.hi - p.lo for p in rows]]  # fmt: skip
    table = pa.table([pa.array(c, t) for c, t in zip(columns, PLAN.types, strict=True)], schema=PLAN)
    storage.write(f"plan/{number:05d}.parquet", part_files.encode(table, {"fingerprint": mark}))


def _same(run: Run, resolved: dict, reading: ReadConfig, part_size: int | None, paths: list[str]) -> Run:
    """The run, if these settings would have planned it."""
    found = drift(run, resolved, reading, part_size)
    known = {source.path for source in run.sources.values()}
    found += [f"input {p} is not in the plan" for p in paths if p not in known][:3]
    found += [f"input {p} is in the plan and not found now" for p in sorted(known - set(paths))][:3]
    if found:
        raise ValueError(
            f"{run.where} is planned otherwise: {'; '.join(found)}. Take another --out, or add new files with "
            "`plan --extend`"
        )
    return run


def drift(run: Run, resolved: dict[str, Any], reading: ReadConfig, part_size: int | None) -> list[str]:
    """What of these settings, the models resolved to their hashes, is not as the run was planned."""
    size = run.job["part_size"]
    before = {"part_size": size, **of_record(run.job["config"]), "reading": dataclasses.asdict(anchored(run.reading))}
    now = {"part_size": part_size or size, **of_record(resolved), "reading": dataclasses.asdict(anchored(reading))}
    return differences(before, json.loads(json.dumps(now)))


def extend(out: str, inputs: Sequence[str]) -> tuple[Run, list[Source]]:
    """Add the files that a plan does not know yet, with its own settings; what it knows keeps its ids."""
    run = Run.open(out)
    specs = list(inputs) or run.reading.inputs
    files = _find_all(specs, run.reading.split)
    known = {source.path for source in run.sources.values()}
    new = _describe_all([one for one in files if one[1] not in known], run.job["root"], run.reading, run.storage)
    if new:
        number = run.plans
        run.storage.write(f"plan/{number:05d}.json", json.dumps([dataclasses.asdict(s) for s in new]).encode())
        write_parts(run.storage, number, new, run.job["part_size"], run.fingerprint)
    return Run.open(out), new
