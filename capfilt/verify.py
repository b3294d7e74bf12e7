"""Verifying: every planned row is there once, every text has one fate, every file is as it was written.

Nothing is taken from an account that can be counted from the files themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip.files import not_permitted
from capfilt.export import exported_to
from capfilt.exported import COUNTED, MARKERS, OURS, DamagedExport, count
from capfilt.run import Part, Run
from capfilt.schema import STATUSES
from capfilt.select.choose import is_whole, selections, table_name, tables_of
from capfilt.settings import DONE, FAILED_PARTS, MISMATCH
from capfilt.store import parts as part_files
from capfilt.store.identity import differences, sample_id
from capfilt.store.parts import DamagedPart, name_of
from capfilt.store.storage import Storage, open_storage

_COLUMNS = ["sample_id", "source_uri", "source_row", "key", "status", "web_text", "syn_text", "part_id"]


class Findings:
    """What is wrong, and what was counted."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.missing = 0
        self.rows: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.ids: list[np.ndarray] = []
        self.kept: dict[str, int] = {}
        """SHA-256 of a selection's table -> texts that it keeps, counted from it."""
        self.looked_at: list[str] = []
        """What was counted of selections and exports, to be said."""

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
    for name in sorted(run.storage.listing("exports")):
        if name.count("/") > 1:  # an export itself, which may be kept here
            continue
        said = json.loads(run.storage.read(name))
        _check_export(exported_to(run.storage, said["to"]), found, said)
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
    except PermissionError as error:
        found.wrong.append(f"{name}: {not_permitted(error)}")
        return
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
    whole = is_whole(run, said)
    if not whole:
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
    if whole:
        _count_selection(run, name, said, found)


def _count_selection(run: Run, name: str, said: dict[str, Any], found: Findings) -> None:
    """Hold the account of a selection against its table."""
    counts: dict[str, Counter[str]] = {"kept": Counter(), "dropped": Counter(), "reasons": Counter()}
    columns = ["text_source", "kept", "reason"]
    try:
        for table in tables_of(run, name, columns):
            for row in table.group_by(columns, use_threads=False).aggregate([([], "count_all")]).to_pylist():
                verdict = "kept" if row["kept"] else "dropped"
                counts[verdict][row["text_source"]] += row["count_all"]
                counts["reasons"][f"{verdict}: {row['reason']}"] += row["count_all"]
    except (OSError, pa.ArrowException) as error:
        found.wrong.append(f"{table_name(name)} cannot be read ({error}); select again")
        return
    counted = {key: dict(counter) for key, counter in counts.items()}
    for difference in differences({key: said[key] for key in counted}, counted):
        found.wrong.append(f"selection {name}: {difference} in its table")
    kept, texts = counts["kept"].total(), counts["reasons"].total()
    found.kept[said["files"]["texts.parquet"]] = kept
    found.looked_at.append(f"selection {name}: {kept:,} of {texts:,} texts are kept")


def _check_export(storage: Storage, found: Findings, noted: dict[str, Any] | None = None) -> None:
    """Hold an export's files against what it says of itself, and against what the run noted and selected."""
    try:
        said = json.loads(storage.read("_SUCCESS"))
        files, form = said["files"], said["format"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        found.wrong.append(f"{storage.root} has no readable _SUCCESS: the export is not complete")
        return
    whole = [name for name, facts in files.items() if _is_as_written(storage, name, facts, found)]
    others = [name for name in storage.listing("") if OURS.fullmatch(name) and name not in (*files, *MARKERS)]
    for name in sorted(others)[:3]:
        found.wrong.append(f"{storage.root}/{name} is not of this export, and training would read it as well")
    same = noted is not None and all(noted[key] == said[key] for key in ("selection", "format"))
    if same and {key: noted.get(key) for key in said} != said:
        found.wrong.append(f"{storage.root} holds another export than the run noted: export again")
    if len(whole) < len(files):
        return
    try:
        held = count(storage, form, files)
    except DamagedExport as error:
        found.wrong.append(str(error))
        return
    for difference in differences({name: said.get(name) for name in held}, held):
        found.wrong.append(f"{storage.root}: {difference} in its files")
    kept = found.kept.get(said["selection_sha256"], said["pairs"])
    if said["pairs"] != kept:
        found.wrong.append(f"{storage.root} has {said['pairs']:,} pairs, selection {said['selection']} keeps {kept:,}")
    numbers = ", ".join(f"{held[name]:,} {name}" for name in COUNTED if name in held)
    found.looked_at.append(f"export {storage.root}: {numbers} in {len(files):,} files")


def _is_as_written(storage: Storage, name: str, facts: dict[str, str], found: Findings) -> bool:
    try:
        if storage.sha256(name) == facts["sha256"]:
            return True
        found.wrong.append(f"{storage.root}/{name} is not as it was written")
    except FileNotFoundError:
        found.wrong.append(f"{storage.root}/{name} is missing")
    return False


def lines(found: Findings) -> list[str]:
    """What to say."""
    rows = sum(found.rows.values())
    said = [f"rows {rows:,} = " + " + ".join(f"{k} {n:,}" for k, n in sorted(found.rows.items()))] if rows else []
    said += found.looked_at
    if found.missing:
        said.append(f"{found.missing:,} parts are not scored yet")
    said += [f"wrong: {one}" for one in found.wrong[:20]]
    if len(found.wrong) > 20:
        said.append(f"and {len(found.wrong) - 20:,} more")
    if not found.wrong and (rows or found.looked_at):
        said.append("nothing is wrong" + (" in what is scored" if found.missing else ""))
    return said
