"""Verifying: every planned row is there once, every text has one fate, every file is as it was written."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc

from capfilt import parts as part_files
from capfilt.export import exported_to
from capfilt.identity import sample_id
from capfilt.parts import DamagedPart, name_of
from capfilt.run import Part, Run
from capfilt.schema import STATUSES
from capfilt.select import is_whole, selections, table_name
from capfilt.settings import DONE, FAILED_PARTS, MISMATCH
from capfilt.storage import Storage, open_storage

_COLUMNS = ["sample_id", "source_uri", "source_row", "key", "status", "web_text", "syn_text", "part_id"]


class Findings:
    """What is wrong, and what was counted."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.missing = 0
        self.rows: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.ids: list[np.ndarray] = []

    def status(self) -> int:
        return MISMATCH if self.wrong else FAILED_PARTS if self.missing else DONE


def verify(where: str) -> Findings:
    """Check a run, with its selections and exports, or an export by itself."""
    found = Findings()
    storage = open_storage(where)
    if not storage.exists("job.json") and storage.exists("_SUCCESS"):
        _check_export(storage, found)
        return found
    run = Run.open(where)
    _check_indexes(run, found)
    present = run.parts.present()
    planned = {part.pid for part in run.plan}
    found.wrong += [f"{name_of(pid)} is not in the plan" for pid in sorted(present.keys() - planned)]
    if len(planned) != len(run.plan):
        found.wrong.append("the plan names a part twice")
    for part in run.plan:
        if part.pid in present:
            _check_part(run, part, found)
        else:
            found.missing += 1
    different = len(np.unique(np.concatenate(found.ids))) if found.ids else 0
    if sum(found.rows.values()) != different:
        found.wrong.append(f"{sum(found.rows.values()):,} rows have {different:,} different ids")
    for name in selections(run):
        _check_selection(run, name, found)
    for name in run.storage.listing("exports"):
        if name.count("/") > 1:  # an export itself, which may be kept here
            continue
        said = json.loads(run.storage.read(name))
        _check_export(exported_to(run.storage, said["to"]), found)
    return found


def _check_indexes(run: Run, found: Findings) -> None:
    for source in run.sources.values():
        if source.index:
            try:
                part_files.check(run.storage.read(source.index))
            except (DamagedPart, OSError) as error:
                found.wrong.append(f"{source.index}: {error}")


def _check_part(run: Run, part: Part, found: Findings) -> None:
    name = name_of(part.pid)
    try:
        content = run.storage.read(name)
        table = part_files.decode(content, _COLUMNS)
        facts = part_files.facts_of(content)
    except (DamagedPart, OSError) as error:
        found.wrong.append(f"{name}: {error}; `score` does it again")
        return
    if facts.get("fingerprint") != run.fingerprint:
        found.wrong.append(f"{name} was scored with other settings ({facts.get('fingerprint')})")
    if table["source_row"].to_pylist() != list(range(part.lo, part.hi)):
        found.wrong.append(f"{name} has not the rows {part.lo} to {part.hi}, each once")
    if set(table["source_uri"].to_pylist()) | {part.source} != {part.source}:
        found.wrong.append(f"{name} has rows of another source than {part.source}")
    ids = table["sample_id"].to_pylist()
    rows = zip(ids, table["source_row"].to_pylist(), table["key"].to_pylist(), strict=True)
    if any(sample_id(part.source, row, key) != said for said, row, key in rows):
        found.wrong.append(f"{name} has ids that are not those of its rows")
    found.ids.append(np.array([int(i[:16], 16) for i in ids], dtype=np.uint64))
    statuses = Counter(table["status"].to_pylist())
    if statuses.keys() - set(STATUSES):
        found.wrong.append(f"{name} has unknown statuses {sorted(statuses.keys() - set(STATUSES))}")
    found.rows.update(statuses)
    for kind in ("web", "syn"):
        found.texts[kind] += pc.sum(pc.list_value_length(table[f"{kind}_text"])).as_py() or 0


def _check_selection(run: Run, name: str, found: Findings) -> None:
    said: dict[str, Any] = json.loads(run.storage.read(f"selections/{name}/_SUCCESS"))
    if not is_whole(run, said):
        found.wrong.append(f"{table_name(name)} is not as it was written; select again")
    rows, texts = sum(said["rows_in"].values()), sum(said["texts_in"].values())
    kept, dropped = sum(said["kept"].values()), sum(said["dropped"].values())
    if texts != kept + dropped or texts != sum(said["reasons"].values()):
        found.wrong.append(f"selection {name}: {texts:,} texts are not {kept:,} kept + {dropped:,} dropped")
    if said["parts"] == len(run.plan) and not found.missing:
        if rows != sum(found.rows.values()) or said["rows_in"] != dict(found.rows):
            found.wrong.append(f"selection {name} counts {rows:,} rows, the annotations {sum(found.rows.values()):,}")
        if texts != sum(found.texts.values()):
            found.wrong.append(
                f"selection {name} counts {texts:,} texts, the annotations {sum(found.texts.values()):,}"
            )


def _check_export(storage: Storage, found: Findings) -> None:
    try:
        said = json.loads(storage.read("_SUCCESS"))
    except (FileNotFoundError, ValueError):
        found.wrong.append(f"{storage.root} has no readable _SUCCESS: the export is not complete")
        return
    for name, facts in said["files"].items():
        try:
            if storage.sha256(name) != facts["sha256"]:
                found.wrong.append(f"{storage.root}/{name} is not as it was written")
        except FileNotFoundError:
            found.wrong.append(f"{storage.root}/{name} is missing")


def lines(found: Findings) -> list[str]:
    """What to say."""
    rows = sum(found.rows.values())
    said = [f"rows {rows:,} = " + " + ".join(f"{k} {n:,}" for k, n in sorted(found.rows.items()))] if rows else []
    if found.missing:
        said.append(f"{found.missing:,} parts are not scored yet")
    return said + [f"wrong: {one}" for one in found.wrong[:20]] + ([] if found.wrong else ["nothing is wrong"])
