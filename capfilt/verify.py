"""Verification: every planned row exists once, every text is kept or dropped once, every file is as written.

Everything that can be counted from the files themselves is counted, not taken from an account.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip.errors import DataError
from blip.files import not_permitted
from capfilt.export import exported_to, read_manifest, read_note
from capfilt.exported import COUNTED, MARKERS, OURS, DamagedExport, count
from capfilt.extra.results import ExtraParts, counts_of, scorers_of
from capfilt.run import Part, Run
from capfilt.schema import STATUSES
from capfilt.select.choose import is_whole, read_account, selections, table_name, tables_of
from capfilt.settings import DONE, FAILED_PARTS, MISMATCH
from capfilt.store import parts as part_files
from capfilt.store.identity import differences, sample_id
from capfilt.store.parts import DamagedPart, name_of
from capfilt.store.storage import Storage, open_storage

_COLUMNS = ["sample_id", "source_uri", "source_row", "key", "status", "web_text", "syn_text", "part_id"]


class Findings:
    """Problems and counts of a run or export."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.missing = 0
        self.rows: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.ids: list[np.ndarray] = []
        self.kept: dict[str, int] = {}
        """Number of texts that a selection keeps, counted in its table, by the table's SHA-256."""
        self.summary: list[str] = []
        """Lines with the counts of selections and exports."""

    def status(self) -> int:
        return MISMATCH if self.problems else FAILED_PARTS if self.missing else DONE


def verify(where: str) -> Findings:
    """Check a run, with its selections and exports, or an export by itself."""
    findings = Findings()
    storage = open_storage(where)
    if not storage.exists("job.json") and storage.exists("_SUCCESS"):
        _check_export(storage, findings)
        return findings
    try:
        run = Run.open(where)
    except DataError as error:
        if not storage.exists("job.json"):
            raise
        findings.problems.append(str(error))
        return findings
    _check_indexes(run, findings)
    present = run.parts.present()
    planned = {part.pid for part in run.plan}
    findings.problems += [f"{name_of(pid)} is not in the plan" for pid in sorted(present.keys() - planned)]
    if len(planned) != len(run.plan):
        findings.problems.append("the plan names a part twice")
    for part in run.plan:
        if part.pid in present:
            _check_part(run, part, findings)
        else:
            findings.missing += 1
    different = len(np.unique(np.concatenate(findings.ids))) if findings.ids else 0
    if sum(findings.rows.values()) != different:
        findings.problems.append(f"{sum(findings.rows.values()):,} rows have {different:,} different ids")
    for name in scorers_of(run):
        _check_extra(run, name, present.keys(), findings)
    for name in selections(run):
        _check_selection(run, name, findings)
    for name in sorted(run.storage.listing("exports")):
        if name.count("/") > 1:  # a file of an export inside the run
            continue
        try:
            note = read_note(run, name)
        except DataError as error:
            findings.problems.append(str(error))
            continue
        _check_export(exported_to(run.storage, note["to"]), findings, note)
    return findings


def _check_indexes(run: Run, findings: Findings) -> None:
    for source in run.sources.values():
        if source.index:
            try:
                part_files.check(run.storage.read(source.index))
            except (DamagedPart, OSError) as error:
                findings.problems.append(f"{source.index}: {error}")


def _check_part(run: Run, part: Part, findings: Findings) -> None:
    name = name_of(part.pid)
    try:
        content = run.storage.read(name)
        table = part_files.decode(content, _COLUMNS)
        facts = part_files.facts_of(content)
    except PermissionError as error:
        findings.problems.append(f"{name}: {not_permitted(error)}")
        return
    except (DamagedPart, OSError) as error:
        findings.problems.append(f"{name}: {error}; repeat `capfilt score` to score it again")
        return
    if facts.get("fingerprint") != run.fingerprint:
        findings.problems.append(f"{name} was scored with other settings ({facts.get('fingerprint')})")
    if table["source_row"].to_pylist() != list(range(part.lo, part.hi)):
        findings.problems.append(f"{name} does not have each of the rows {part.lo} to {part.hi} once, in order")
    if set(table["source_uri"].to_pylist()) | {part.source} != {part.source}:
        findings.problems.append(f"{name} has rows of sources other than {part.source}")
    ids = table["sample_id"].to_pylist()
    rows = zip(ids, table["source_row"].to_pylist(), table["key"].to_pylist(), strict=True)
    if any(sample_id(part.source, row, key) != recorded for recorded, row, key in rows):
        findings.problems.append(f"{name} has ids that do not match its rows")
    findings.ids.append(np.array([int(i[:16], 16) for i in ids], dtype=np.uint64))
    statuses = Counter(table["status"].to_pylist())
    if statuses.keys() - set(STATUSES):
        findings.problems.append(f"{name} has unknown statuses {sorted(statuses.keys() - set(STATUSES))}")
    findings.rows.update(statuses)
    for kind in ("web", "syn"):
        findings.texts[kind] += pc.sum(pc.list_value_length(table[f"{kind}_text"])).as_py() or 0


def _check_extra(run: Run, name: str, present: Collection[str], findings: Findings) -> None:
    """Check the files of a further scorer and count their rows."""
    try:
        counts = counts_of(run, name, findings.problems.append)
    except DataError as error:
        findings.problems.append(str(error))
        return
    there = ExtraParts(run.storage, name).present().keys()
    findings.problems += [
        f"extra/{name} has {pid}, which is not in the plan" for pid in sorted(there - {part.pid for part in run.plan})
    ]
    missing = len(present - there)
    line = f"extra {name}: rows {counts['rows']:,} = with scores {counts['scored']:,} + none {counts['not_scored']:,}"
    line += f" + raised an error {counts['raised']:,}"
    findings.summary.append(line + (f"; {missing:,} scored parts lack it" if missing else ""))


def _check_selection(run: Run, name: str, findings: Findings) -> None:
    try:
        account = read_account(run, name)
    except ValueError as error:
        findings.problems.append(str(error))
        return
    whole = is_whole(run, account)
    if not whole:
        findings.problems.append(f"{table_name(name)} has changed since it was written; select again")
    rows, texts = sum(account["rows_in"].values()), sum(account["texts_in"].values())
    kept, dropped = sum(account["kept"].values()), sum(account["dropped"].values())
    if texts != kept + dropped or texts != sum(account["reasons"].values()):
        findings.problems.append(f"selection {name}: {texts:,} texts are not {kept:,} kept + {dropped:,} dropped")
    if account["parts"] == len(run.plan) and not findings.missing:
        if rows != sum(findings.rows.values()) or account["rows_in"] != dict(findings.rows):
            findings.problems.append(
                f"selection {name} counts {rows:,} rows, the annotations {sum(findings.rows.values()):,}"
            )
        if texts != sum(findings.texts.values()):
            findings.problems.append(
                f"selection {name} counts {texts:,} texts, the annotations {sum(findings.texts.values()):,}"
            )
    if whole:
        _count_selection(run, name, account, findings)


def _count_selection(run: Run, name: str, account: dict[str, Any], findings: Findings) -> None:
    """Compare the account of a selection with its table."""
    counts: dict[str, Counter[str]] = {"kept": Counter(), "dropped": Counter(), "reasons": Counter()}
    columns = ["text_source", "kept", "reason"]
    try:
        for table in tables_of(run, name, columns):
            for row in table.group_by(columns, use_threads=False).aggregate([([], "count_all")]).to_pylist():
                verdict = "kept" if row["kept"] else "dropped"
                counts[verdict][row["text_source"]] += row["count_all"]
                counts["reasons"][f"{verdict}: {row['reason']}"] += row["count_all"]
    except (OSError, pa.ArrowException) as error:
        findings.problems.append(f"{table_name(name)} cannot be read ({error}); select again")
        return
    counted = {key: dict(counter) for key, counter in counts.items()}
    for difference in differences({key: account[key] for key in counted}, counted):
        findings.problems.append(f"selection {name}: {difference} in its table")
    kept, texts = counts["kept"].total(), counts["reasons"].total()
    findings.kept[account["files"]["texts.parquet"]] = kept
    findings.summary.append(f"selection {name}: {kept:,} of {texts:,} texts are kept")


def _check_export(storage: Storage, findings: Findings, noted: dict[str, Any] | None = None) -> None:
    """Compare an export's files with its manifest, with the run's record of it and with the selection."""
    try:
        manifest = read_manifest(storage)
    except (FileNotFoundError, DataError):
        findings.problems.append(f"{storage.root} has no readable _SUCCESS: the export is not complete")
        return
    files, form = manifest["files"], manifest["format"]
    whole = [name for name, facts in files.items() if _is_as_written(storage, name, facts, findings)]
    others = [name for name in storage.listing("") if OURS.fullmatch(name) and name not in (*files, *MARKERS)]
    for name in sorted(others)[:3]:
        findings.problems.append(f"{storage.root}/{name} is not part of this export, but training would read it")
    same = noted is not None and all(noted[key] == manifest[key] for key in ("selection", "format"))
    if same and {key: noted.get(key) for key in manifest} != manifest:
        findings.problems.append(f"{storage.root} does not hold the export that the run recorded: export again")
    if len(whole) < len(files):
        return
    try:
        in_files = count(storage, form, files)
    except DamagedExport as error:
        findings.problems.append(str(error))
        return
    for difference in differences({name: manifest.get(name) for name in in_files}, in_files):
        findings.problems.append(f"{storage.root}: {difference} in its files")
    selected = findings.kept.get(manifest["selection_sha256"], manifest["pairs"])
    if manifest["pairs"] != selected:
        findings.problems.append(
            f"{storage.root} has {manifest['pairs']:,} pairs, selection {manifest['selection']} keeps {selected:,}"
        )
    numbers = ", ".join(f"{in_files[name]:,} {name}" for name in COUNTED if name in in_files)
    findings.summary.append(f"export {storage.root}: {numbers} in {len(files):,} files")


def _is_as_written(storage: Storage, name: str, facts: dict[str, str], findings: Findings) -> bool:
    try:
        if storage.sha256(name) == facts["sha256"]:
            return True
        findings.problems.append(f"{storage.root}/{name} has changed since it was written")
    except FileNotFoundError:
        findings.problems.append(f"{storage.root}/{name} is missing")
    return False


def lines(findings: Findings) -> list[str]:
    """Format the findings as lines of text."""
    rows = sum(findings.rows.values())
    out = [f"rows {rows:,} = " + " + ".join(f"{k} {n:,}" for k, n in sorted(findings.rows.items()))] if rows else []
    out += findings.summary
    if findings.missing:
        out.append(f"{findings.missing:,} parts are not scored yet")
    out += [f"wrong: {one}" for one in findings.problems[:20]]
    if len(findings.problems) > 20:
        out.append(f"and {len(findings.problems) - 20:,} more")
    if not findings.problems and (rows or findings.summary):
        out.append("nothing is wrong" + (" in what is scored" if findings.missing else ""))
    return out
