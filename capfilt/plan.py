"""The plan: the rows and the parts in which they are scored. Made once, without a GPU, and never changed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from blip.checkpoints.naming import check_named
from blip.data.formats.finding import SourceFile
from blip.data.formats.splits import check_split
from blip.data.paths import local
from blip.errors import DataError
from capfilt.reading import describe, find
from capfilt.run import PLAN, Part, Run
from capfilt.settings import ReadConfig, ScoreConfig, at_least, decided, has_gpu, of_record, resolve, to_record
from capfilt.sources import HUB, PlannedSource, is_remote
from capfilt.store import parts as part_files
from capfilt.store.identity import differences, fingerprint, part_id
from capfilt.store.storage import Storage, open_storage


def _find_all(specs: Sequence[str], split: str | None) -> list[SourceFile]:
    """Return the files that all inputs name. DataError for duplicates."""
    files = [one for spec in specs for one in find(spec, split)]
    (path, times), *_ = Counter(one.path for one in files).most_common(1) or [("", 0)]
    if times > 1:
        raise DataError(f"duplicate input {path}")
    return files


def _relpath(path: str, root: str) -> str:
    """Return a path relative to the common root; anything outside it, such as a data set on the hub, keeps its name."""
    if path.startswith(HUB) or is_remote(path):
        return path.removeprefix(f"{root}/") if root else path
    return path if is_remote(root) else os.path.relpath(path, root).replace(os.sep, "/")


def _root(paths: Sequence[str]) -> str:
    """Return the common root of all inputs; that of the local ones if local and remote are mixed."""
    named = [p for p in paths if not p.startswith(HUB)]
    local = [os.path.dirname(p) for p in named if not is_remote(p)]
    stores = {p.split("://")[0] for p in named if is_remote(p)}
    if local or len(stores) != 1:
        return os.path.commonpath(local) if local else ""
    inside = [os.path.dirname(p.split("://")[1]) for p in named]
    return f"{stores.pop()}://{os.path.commonpath(inside)}"


# The plan -------------------------------------------------------------------------------------------------------------


def auto_part_size() -> int:
    """Return a part size that takes some 30 to 120 seconds: 1024 rows with a GPU, 64 without."""
    return 1024 if has_gpu() else 64


def make(out: str, config: ScoreConfig, reading: ReadConfig, part_size: int | None = None) -> Run:
    """Freeze a plan into a folder or object store, or return the existing one if it is the same.

    ValueError, with nothing touched, lists the differences if it is not. DataError if there is nothing to read.
    """
    at_least(1, part_size=part_size)
    storage = open_storage(out)
    planned = Run.open(out) if storage.exists("job.json") else None
    for where in filter(None, (config.captioner, config.filter) if config.scorer == "blip" else ()):
        check_named(where)  # before torch is imported
    config = decided(config, planned and planned.config)
    resolved, reading = resolve(config), anchored(reading)
    files = _find_all(reading.inputs, reading.split)
    if planned:
        return _same(planned, resolved, reading, part_size, [one.path for one in files])
    others = [name for name in storage.entries() if name != "plan"]  # where a plan was killed, there is that
    if others:
        raise DataError(f"{out} is not empty ({', '.join(others[:3])}) and holds no run: give another --out")
    if not files:
        raise DataError("no input: give --input with files, folders or hf:NAME")
    root = _root([one.path for one in files])
    part_size = part_size or (auto_part_size() if config.scorer == "blip" else 1024)
    seen: Counter[str] = Counter()
    sources = _describe_all(files, root, reading, storage, seen)
    if any(one.format in ("json", "imagefolder") and not one.of_split for one in files):
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
    """Return the settings with an absolute image root, which does not depend on the current folder."""
    if reading.image_root is None:
        return reading
    return dataclasses.replace(reading, image_root=os.path.abspath(os.path.expanduser(local(reading.image_root))))


def _describe_all(
    files: Sequence[SourceFile], root: str, reading: ReadConfig, storage: Storage, seen: Counter[str] | None = None
) -> list[PlannedSource]:
    counts = [Counter() for _ in files]  # one each, as threads count
    with ThreadPoolExecutor(4) as pool:
        described = list(
            pool.map(lambda one, mine: describe(one, _relpath(one.path, root), reading, storage, mine), files, counts)
        )
    for mine in counts if seen is not None else ():
        seen.update(mine)
    return described


def write_parts(storage: Storage, number: int, sources: Sequence[PlannedSource], size: int, mark: str) -> None:
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
    """Return the existing run. ValueError lists the differences if these settings would plan another one."""
    changes = drift(run, resolved, reading, part_size)
    known = {source.path for source in run.sources.values()}
    changes += [f"input {p} is not in the plan" for p in paths if p not in known][:3]
    changes += [f"input {p} is in the plan and not found now" for p in sorted(known - set(paths))][:3]
    if changes:
        raise ValueError(
            f"{run.where} is planned otherwise: {'; '.join(changes)}. Take another --out, or add new files with "
            "`plan --extend`"
        )
    return run


def drift(run: Run, resolved: dict[str, Any], reading: ReadConfig, part_size: int | None) -> list[str]:
    """List how these settings, with models resolved to their hashes, differ from those of the run."""
    size = run.job["part_size"]
    before = {"part_size": size, **of_record(run.job["config"]), "reading": dataclasses.asdict(anchored(run.reading))}
    now = {"part_size": part_size or size, **of_record(resolved), "reading": dataclasses.asdict(anchored(reading))}
    return differences(before, json.loads(json.dumps(now)))


def extend(out: str, inputs: Sequence[str]) -> tuple[Run, list[PlannedSource]]:
    """Add files that are not in a plan yet, with the plan's settings; the ids of all others stay as they are."""
    run = Run.open(out)
    specs = list(inputs) or run.reading.inputs
    files = _find_all(specs, run.reading.split)
    known = {source.path for source in run.sources.values()}
    new = _describe_all([one for one in files if one.path not in known], run.job["root"], run.reading, run.storage)
    if new:
        number = run.plans
        run.storage.write(f"plan/{number:05d}.json", json.dumps([dataclasses.asdict(s) for s in new]).encode())
        write_parts(run.storage, number, new, run.job["part_size"], run.fingerprint)
    return Run.open(out), new
