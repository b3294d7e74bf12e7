"""Further scores on disk: extra/NAME/PID.parquet, extra/embedding/PID.npy, and who has made them.

Each file has its own digest, as the annotations have, and the fingerprint of its scorer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from blip.errors import DataError
from capfilt.extra.load import EMBEDDING
from capfilt.extra.scorer import ExtraScorer, WrongScorer
from capfilt.run import Part, Run
from capfilt.store import parts as part_files
from capfilt.store.identity import differences, fingerprint
from capfilt.store.parts import DamagedPart, Parts
from capfilt.store.storage import Storage

FAILURES = "extra/failures"
"""Folder of the notes on attempts of passes over parts that have been scored already."""


class ExtraParts(Parts):
    """The files of one scorer in a run."""

    def __init__(self, storage: Storage, scorer: str) -> None:
        super().__init__(storage)
        self.scorer, self.folder = scorer, f"extra/{scorer}"
        self.suffix = ".npy" if scorer == EMBEDDING else ".parquet"

    def name(self, pid: str) -> str:
        return f"{self.folder}/{pid}{self.suffix}"

    def record(self) -> dict[str, Any]:
        """Read who makes the scores, what decides them, and their columns.

        FileNotFoundError if nobody does; DataError if the file is not as it was written.
        """
        content = self.storage.read(f"{self.folder}/scorer.json")
        try:
            record = json.loads(content)
            expected = {"fingerprint": str, "columns": dict} | ({"size": int} if self.scorer == EMBEDDING else {})
            if not all(isinstance(record[key], kind) for key, kind in expected.items()):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"{self.storage.root}/{self.folder}/scorer.json is damaged; remove that folder to score anew"
            ) from None
        return record

    def claim(self, scorer: dict[str, Any]) -> str:
        """Record who makes the scores, and return the fingerprint; DataError if scores of another are there."""
        record = {**scorer, "fingerprint": fingerprint(scorer)}
        if not self.storage.exists(f"{self.folder}/scorer.json") or not self.present():
            self.storage.write(f"{self.folder}/scorer.json", (json.dumps(record, indent=1) + "\n").encode())
        there = self.record()
        if there["fingerprint"] != record["fingerprint"]:
            changes = "; ".join(differences({k: v for k, v in there.items() if k != "fingerprint"}, scorer)[:3])
            raise DataError(
                f"{self.storage.root}/{self.folder} has the scores of another scorer ({changes}). Nothing was touched; "
                "remove that folder to score anew"
            )
        return record["fingerprint"]

    def check_claim(self, mark: str) -> None:
        """Raise WrongScorer if another process has begun with another scorer of this name since `claim`."""
        if self.record()["fingerprint"] != mark:
            raise WrongScorer(
                f"{self.storage.root}/{self.folder} is now another scorer's: another process has begun it"
            )

    def content(self, part: Part) -> bytes:
        """Read a part's file. FileNotFoundError if there is none; DataError, naming the file, if it is not intact."""
        content = self.storage.read(self.name(part.pid))
        try:
            part_files.check(content)
        except DamagedPart as error:
            raise DataError(
                f"{self.storage.root}/{self.name(part.pid)}: {error}; `score --also` again redoes it"
            ) from None
        return content

    def table(self, part: Part) -> pa.Table:
        """Read a part's scores, with the columns `sample_id` and `error` (null where the scorer raised none)."""
        return part_files.decode(self.content(part))

    def embeddings(self, part: Part) -> np.ndarray:
        """Read a part's embeddings, (rows, E) float16, zeros where there is none. Raises as `content`."""
        try:
            array = part_files.decode_array(self.content(part))
        except DamagedPart as error:
            raise DataError(f"{self.storage.root}/{self.name(part.pid)}: {error}") from None
        if array.dtype != np.float16 or array.ndim != 2 or len(array) != part.rows:
            raise DataError(
                f"{self.storage.root}/{self.name(part.pid)} is {array.dtype} {array.shape}, not float16 "
                f"({part.rows}, E); remove it, and `score --also {self.scorer}` again adds it"
            )
        return array


def record_of(scorer: ExtraScorer) -> dict[str, Any]:
    """Return what is recorded about a scorer, and decides its scores."""
    columns = {name: str(kind) for name, kind in scorer.columns.items()}
    return {"name": scorer.name, "identity": scorer.identity, "side": scorer.side, "columns": columns}


def embedding_record(run: Run, size: int) -> dict[str, Any]:
    """Return what is recorded about embeddings: they are the filter's, so the run's settings decide them."""
    return {"name": EMBEDDING, "identity": {"run": run.fingerprint}, "columns": {}, "size": size}


def encode_table(ids: list[str], rows: list[dict[str, Any]], columns: dict[str, pa.DataType], facts: dict[str, str]
                 ) -> bytes:  # fmt: skip
    """Encode a part's scores: `rows` have columns, or only `error`, or nothing where the row was not scored."""
    arrays = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in columns.items()}
    errors = pa.array([row.get("error") for row in rows], pa.string())
    return part_files.encode(pa.table({"sample_id": pa.array(ids, pa.string()), **arrays, "error": errors}), facts)


def encode_embeddings(rows: list[np.ndarray | None], size: int) -> bytes:
    """Encode a part's embeddings as (rows, E) float16."""
    array = np.zeros((len(rows), size), np.float16)
    for row, embedding in enumerate(rows):
        if embedding is not None:
            array[row] = embedding
    return part_files.encode_array(array)


def scorers_of(run: Run) -> list[str]:
    """List the further scorers of a run."""
    names = {name.split("/")[1] for name in run.storage.listing("extra") if name.endswith("/scorer.json")}
    return sorted(names)


def counts_of(run: Run, name: str, problem: Callable[[str], None] | None = None) -> dict[str, int]:
    """Count the parts and rows of a scorer: with scores, raised by the scorer, and not shown to it.

    A file that is damaged or of another scorer raises DataError, or is given to `problem`.
    """
    parts = ExtraParts(run.storage, name)
    record, there = parts.record(), parts.present()
    counts = dict.fromkeys(("parts", "rows", "scored", "raised", "not_scored"), 0)
    for part in run.plan:
        if part.pid not in there:
            continue
        try:
            given, raised, rows = _count(parts, part, record)
        except DataError as error:
            if problem is None:
                raise
            problem(str(error))
            continue
        counts["parts"] += 1
        for key, n in (("rows", rows), ("scored", given), ("raised", raised), ("not_scored", rows - given - raised)):
            counts[key] += n
    return counts


def forget_raised(run: Run, name: str) -> int:
    """Remove the parts in which a scorer raised an error for a row; returns their number."""
    parts, count = ExtraParts(run.storage, name), 0
    if name == EMBEDDING:
        return 0
    for pid in parts.present():
        try:
            table = part_files.decode(run.storage.read(parts.name(pid)), ["error"])
        except DamagedPart:  # scored again in any case
            continue
        if table["error"].null_count < len(table):
            run.storage.remove(parts.name(pid))
            count += 1
    return count


def _count(parts: ExtraParts, part: Part, record: dict[str, Any]) -> tuple[int, int, int]:
    """Return numbers of rows: with scores, with an error, and all. DataError if the file is not of this scorer."""
    where = parts.name(part.pid)
    if parts.scorer == EMBEDDING:
        array = parts.embeddings(part)
        if array.shape[1] != record["size"]:
            raise DataError(f"{where} has the shape {array.shape}, not {(part.rows, record['size'])}")
        return int(array.any(1).sum()), 0, part.rows
    content = parts.content(part)
    if part_files.facts_of(content).get("fingerprint") != record["fingerprint"]:
        raise DataError(f"{where} was made by another scorer")
    table = part_files.decode(content)
    if len(table) != part.rows:
        raise DataError(f"{where} has {len(table)} rows, not {part.rows}")
    raised = len(table) - table["error"].null_count
    given = np.zeros(len(table), bool)
    for name in record["columns"]:
        given |= np.asarray(table[name].is_valid())
    return int(given.sum()), raised, len(table)
