"""A planned run on disk: settings, sources, parts."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from blip.errors import DataError
from capfilt.settings import ReadConfig, ScoreConfig, of_record
from capfilt.sources import PlannedSource
from capfilt.store import parts as part_files
from capfilt.store.parts import Parts
from capfilt.store.storage import Storage, open_storage

PLAN = pa.schema(
    [("pid", pa.string()), ("source", pa.string()), ("lo", pa.int64()), ("hi", pa.int64()), ("rows", pa.int64())]
)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows lo to hi of a source, scored and committed together."""

    pid: str
    source: str
    lo: int
    hi: int

    @property
    def rows(self) -> int:
        return self.hi - self.lo


class Run:
    """A planned run: the contents of job.json and plan/."""

    def __init__(self, where: str, storage: Storage, job: dict[str, Any]) -> None:
        self.where, self.storage = where, storage
        self.job = job
        """The contents of job.json; its inputs, which may be a million, are kept as `sources` alone."""
        self.fingerprint: str = job["fingerprint"]
        self.config = ScoreConfig(**of_record(job["settings"]))
        self.reading = ReadConfig(**job["reading"])
        self.parts = Parts(storage)
        self.sources: dict[str, PlannedSource] = {}
        self.plan: list[Part] = []
        self.plans = 0
        self._read()

    @classmethod
    def open(cls, where: str) -> Run:
        """Open a run. DataError if the folder is not a run."""
        storage = open_storage(where)
        try:
            job = json.loads(storage.read("job.json"))
            return cls(str(where), storage, job)
        except FileNotFoundError:
            raise DataError(f"{where} is not a planned run (no job.json): make one with `capfilt plan`") from None
        except DataError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}/job.json cannot be read ({error}): was it edited?") from None

    def _read(self) -> None:
        self._add(self.job.pop("inputs"))
        for name in sorted(n for n in self.storage.listing("plan") if n.count("/") == 1 and n.endswith(".parquet")):
            try:
                if self.plans:
                    self._add(json.loads(self.storage.read(name.removesuffix(".parquet") + ".json")))
                table = part_files.decode(self.storage.read(name))
            except PermissionError:
                raise
            except (ValueError, OSError, KeyError, TypeError) as error:
                raise DataError(f"{self.where}/{name} cannot be read ({error}): was it edited?") from None
            for batch in table.select(["pid", "source", "lo", "hi"]).to_batches(max_chunksize=1 << 14):
                rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                self.plan += [
                    Part(pid, sys.intern(source), lo, hi) for pid, source, lo, hi in rows
                ]  # one text for many
            self.plans += 1
        listed = sum(source.rows for source in self.sources.values())
        if self.rows != listed:
            raise DataError(
                f"{self.where}/plan has {self.rows:,} of {listed:,} rows: a file of it is gone; plan another run"
            )

    def _add(self, sources: list[dict[str, Any]]) -> None:
        for values in sources:
            source = PlannedSource(**{**values, "notes": tuple(values["notes"])})
            self.sources[source.relpath] = source

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.plan)

    def command(self, verb: str, *more: str) -> str:
        """The command of a verb on this run, as it can be pasted into a shell."""
        return shlex.join(["capfilt", verb, self.where, *more])

    def damaged(self) -> list[PlannedSource]:
        return [source for source in self.sources.values() if source.damage]

    def share(self, rank: int, world: int) -> list[Part]:
        """Return the parts of one of several processes, in the order of their ids, which is as good as random."""
        return _in_order(part for part in self.plan if int(part.pid[:8], 16) % world == rank)

    def in_order(self) -> list[Part]:
        return _in_order(self.plan)


def _in_order(parts: Iterable[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.pid)
