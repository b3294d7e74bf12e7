"""Rules that need the whole crawl: copies of an image, images that must not be used, texts that many images share.

Like all rules it drops nothing at scoring: hashes are annotated, and a selection compares them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from blip.errors import DataError
from capfilt.extra.load import EMBEDDING
from capfilt.run import Part, Run
from capfilt.schema import USABLE
from capfilt.select import cosine, phash
from capfilt.select.conditions import lacking, scores_of
from capfilt.select.policies import SelectConfig

FINE, DUPLICATE, CONTAMINATED = 0, 1, 2
WHY = {DUPLICATE: "rule duplicate", CONTAMINATED: "rule contaminated"}
_COLUMNS = ["status", "image_sha256", "phash64", "web_text_norm"]


@dataclass(frozen=True)
class Copies:
    """Copied and contaminated rows and shared texts, by part."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    """Verdict per row of a part: (N,) of FINE, DUPLICATE and CONTAMINATED."""
    shared: dict[str, np.ndarray] = field(default_factory=dict)
    """Whether too many images share each web text of a part: (T,) bool."""


class Listed(NamedTuple):
    """Hashes of images that must not be used: (M,) uint64 each."""

    sha256: np.ndarray
    phash64: np.ndarray

    def digest(self) -> str:
        """Return a digest of the list."""
        return hashlib.sha256(self.sha256.tobytes() + b" " + self.phash64.tobytes()).hexdigest()[:16]


class _Seen(NamedTuple):
    """Hashes of a part's rows and web texts."""

    usable: np.ndarray
    sha256: tuple[np.ndarray, np.ndarray]
    phash64: tuple[np.ndarray, np.ndarray]
    texts: np.ndarray
    """Digests of the web texts, (T,) uint64; 0 where no word is left."""
    text_rows: np.ndarray


def find(run: Run, done: list[Part], config: SelectConfig) -> Copies:
    """Find the copies that a selection excludes; the first of equal images in the plan is FINE."""
    if not (config.duplicates or config.contamination or config.shared):
        return Copies()
    seen = {part.pid: _read(run, part) for part in done}
    embeddings = _embeddings(run, done) if config.duplicates == "embedding" else None
    rows = _judge_rows(list(seen.values()), config, embeddings)
    shared = _judge_texts(list(seen.values()), config.shared) if config.shared else {}
    return Copies(
        dict(zip(seen, np.split(rows, np.cumsum([len(s.usable) for s in seen.values()])[:-1]), strict=True)),
        dict(zip(seen, shared, strict=True)) if config.shared else {},
    )


def _embeddings(run: Run, done: list[Part]) -> np.ndarray:
    """Read the embeddings of all parts, (N, E) float16. DataError, with the remedy, if a part has none."""
    parts = scores_of(run, EMBEDDING)
    array = np.empty((sum(part.rows for part in done), parts.record()["size"]), np.float16)
    at = 0
    for part in done:
        try:
            array[at : at + part.rows] = parts.embeddings(part)
        except FileNotFoundError:
            raise lacking(parts, part) from None
        at += part.rows
    return array


def _read(run: Run, part: Part) -> _Seen:
    table = run.parts.read(part.pid, _COLUMNS)
    if "phash64" not in table.column_names:
        raise DataError(f"{run.where} was scored before images had hashes; plan and score another run")
    texts = table["web_text_norm"].combine_chunks()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(texts), 0))
    return _Seen(
        np.isin(np.asarray(table["status"].to_pylist(), dtype=str), USABLE),
        _prefixes(table["image_sha256"].to_pylist()),
        phash.numbers(table["phash64"].to_pylist()),
        np.array([_digest(t) for t in pc.list_flatten(texts).to_pylist()], dtype=np.uint64),
        np.repeat(np.arange(len(table)), lengths),
    )


def _prefixes(digests: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 64 bits of each SHA-256, enough to tell ten million files apart."""
    return phash.numbers([d and d[:16] for d in digests])


def _digest(text: str | None) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") if text else 0


def _judge_rows(seen: list[_Seen], config: SelectConfig, embeddings: np.ndarray | None) -> np.ndarray:
    usable = np.concatenate([s.usable for s in seen])
    hashes = {
        name: tuple(np.concatenate([getattr(s, name)[i] for s in seen]) for i in (0, 1))
        for name in ("sha256", "phash64")
    }
    verdict = np.full(len(usable), FINE, dtype=np.uint8)
    if embeddings is not None:
        among = np.flatnonzero(usable & embeddings.any(1))
        verdict[among[cosine.later_ones(embeddings[among], config.duplicate_cosine)]] = DUPLICATE
    elif config.duplicates:
        values, there = hashes[config.duplicates]
        among = np.flatnonzero(usable & there)
        later = phash.later_ones(values[among], config.duplicate_bits if config.duplicates == "phash64" else 0)
        verdict[among[later]] = DUPLICATE
    if config.contamination:
        listed = read_list(config.contamination)
        for name, bits in (("sha256", 0), ("phash64", config.duplicate_bits)):
            values, there = hashes[name]
            verdict[there & phash.near_any(values, getattr(listed, name), bits)] = CONTAMINATED
    return verdict


def _judge_texts(seen: list[_Seen], most: int) -> list[np.ndarray]:
    """Mark texts that more than `most` images share; a text that an image has twice counts once."""
    once = [np.unique(np.stack([s.texts, s.text_rows.astype(np.uint64)]), axis=1)[0] for s in seen]
    texts, counts = np.unique(np.concatenate(once), return_counts=True)
    common = texts[(counts > most) & (texts != 0)]
    return [np.isin(s.texts, common) for s in seen]


def read_list(where: str) -> Listed:
    """Read the hashes of images that must not be used: a file of hashes in hex, or a run that has scored the images.

    A line of 64 digits is the SHA-256 of a file, one of 16 a perceptual hash; # begins a comment. DataError names the
    line that is neither.
    """
    path = Path(where).expanduser()
    if "://" in where or (path / "job.json").is_file():
        run = Run.open(where)
        tables = [run.parts.read(part.pid, _COLUMNS) for part in run.plan if run.parts.exists(part.pid)]
        lines = [d for table in tables for name in ("image_sha256", "phash64") for d in table[name].to_pylist() if d]
    elif path.is_file():
        lines = [line.partition("#")[0].strip().lower() for line in path.read_text("utf-8", "replace").splitlines()]
    else:
        raise DataError(f"contamination {where}: no such file, and no run that was scored")
    digests: dict[int, list[str]] = {64: [], 16: []}
    for number, line in enumerate(lines, 1):
        if line and (len(line) not in digests or not set(line) <= set("0123456789abcdef")):
            raise DataError(f"{where}, line {number}: expected 64 hex digits (SHA-256) or 16 (perceptual hash), "
                            f"got {line[:40]!r}")  # fmt: skip
        if line:
            digests[len(line)].append(line)
    if not any(digests.values()):
        raise DataError(f"contamination {where} lists no images")
    return Listed(*(np.unique(phash.numbers([d[:16] for d in digests[n]])[0]) for n in (64, 16)))
