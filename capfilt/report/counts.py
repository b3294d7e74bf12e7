"""Counts of a report, taken part by part, and the images that its page shows as examples."""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip.errors import DataError
from capfilt.extra.results import counts_of, scorers_of
from capfilt.report import steps
from capfilt.run import Part, Run
from capfilt.schema import USABLE
from capfilt.select.choose import Whole, scored_parts, select_part
from capfilt.select.policies import SPARED, SYN, WEB, SelectConfig
from capfilt.settings import ReportOptions
from capfilt.store.parts import facts_of, name_of

BINS = 200
"""Number of threshold steps; histograms have one more bin, for scores of exactly 1."""
EDGE = 0.05
"""Scores this near to the threshold are on the edge."""
_COLUMNS = [
    "sample_id", "source_uri", "source_row", "status", "error_code", "web_text", "web_text_norm", "syn_text", "itm_web",
    "itm_syn", "rule_flags", "device", "seconds",
]  # fmt: skip
_MOST = 1_000_000
"""Most distinct captions or words counted at once; beyond that, the rarest are forgotten."""
NULL = "report/null.json"
"""File with the scores of shuffled captions, once `calibrate --method null` has measured them."""


@dataclass
class Numbers:
    """All counts of a report."""

    account: dict[str, Counter] = field(
        default_factory=lambda: {k: Counter() for k in ("rows_in", "texts_in", "kept", "dropped", "reasons")}
    )
    codes: Counter = field(default_factory=Counter)
    histogram: dict[str, np.ndarray] = field(
        default_factory=lambda: {k: np.zeros(BINS + 1, np.int64) for k in ("web", "syn")}
    )
    unscored: Counter = field(default_factory=Counter)
    """Number of texts without a score by source."""
    thresholds: list[float] | None = None
    """Thresholds of the slider; None if the selection has no one threshold to move."""
    kept_at: dict[str, np.ndarray] = field(default_factory=dict)
    """Number of texts by source that the selection keeps at each of `thresholds`."""
    captions: dict[str, Counter] = field(default_factory=lambda: {k: Counter() for k in ("web", "syn")})
    forgotten: bool = False
    texts: Counter = field(default_factory=Counter)
    """Number of captions by kind, including forgotten ones."""
    word_count: Counter = field(default_factory=Counter)
    """Number of words by kind, including forgotten ones."""
    words: dict[str, Counter] = field(default_factory=lambda: {k: Counter() for k in ("web", "syn")})
    shards: dict[str, Counter] = field(default_factory=dict)
    flags: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    examples: dict[str, list[tuple[Any, str, int]]] = field(default_factory=dict)
    """Example images by group of `report.page`, as (order, part, row), ordered by a hash or by score."""


def gather(run: Run, config: SelectConfig, whole: Whole, options: ReportOptions) -> Numbers:
    """Read every part once."""
    numbers = Numbers(thresholds=steps.thresholds(config))
    done = scored_parts(run)
    for part in done:
        table = run.parts.read(part.pid, _COLUMNS)
        chosen = select_part(run, part, config, whole, numbers.account)
        _count(numbers, table, chosen)
        _count_steps(numbers, chosen, config)
        _collect(numbers, part, table, chosen, config, options.per_group)
    _collect_repeated(run, done, numbers, options.per_group)
    return numbers


def _count(numbers: Numbers, table: pa.Table, chosen: pa.Table) -> None:
    numbers.codes.update(code for code in table["error_code"].to_pylist() if code)
    numbers.flags.update(pc.list_flatten(table["rule_flags"]).to_pylist())
    device = table["device"][0].as_py()
    numbers.seconds[device] += pc.sum(table["seconds"]).as_py() or 0.0
    shard = numbers.shards.setdefault(table["source_uri"][0].as_py(), Counter())
    shard["rows"] += len(table)
    shard["errors"] += sum(status not in USABLE for status in table["status"].to_pylist())
    kept = chosen["kept"].to_numpy()
    source = np.asarray(chosen["text_source"].to_pylist(), dtype=object)
    for kind in ("web", "syn"):
        mine = source == kind
        shard[kind] += int(mine.sum())
        shard[f"{kind}_kept"] += int(kept[mine].sum())
        scores = pc.drop_null(pc.list_flatten(table[f"itm_{kind}"])).to_numpy()
        numbers.histogram[kind] += np.bincount((scores * BINS + 1e-4).astype(int), minlength=BINS + 1)[: BINS + 1]
        texts = pc.drop_null(pc.list_flatten(table["web_text_norm" if kind == "web" else "syn_text"]))
        numbers.texts[kind] += len(texts)
        _add_counts(numbers.captions[kind], pc.value_counts(texts))
        words = pc.value_counts(pc.list_flatten(pc.utf8_split_whitespace(texts)))
        _add_counts(numbers.words[kind], words)
        numbers.word_count[kind] += pc.sum(words.field("counts")).as_py() or 0
        for counter in (numbers.captions[kind], numbers.words[kind]):
            numbers.forgotten |= _bound(counter)


def _count_steps(numbers: Numbers, chosen: pa.Table, config: SelectConfig) -> None:
    """Count what each threshold of the slider keeps."""
    source = np.asarray(chosen["text_source"].to_pylist(), dtype=object)
    numbers.unscored.update(source[np.asarray(pc.is_null(chosen["score"]))].tolist())
    if numbers.thresholds is None:
        return
    spans = steps.ranges(chosen, config, numbers.thresholds)
    if spans is None:
        numbers.thresholds, numbers.kept_at = None, {}
        return
    for name in set(source.tolist()):
        kept = steps.counts(spans, source == name, len(numbers.thresholds))
        numbers.kept_at[name] = numbers.kept_at.get(name, 0) + kept


def _add_counts(counter: Counter, counts: pa.StructArray) -> None:
    for value, n in zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True):
        counter[value] += n


def _bound(counter: Counter) -> bool:
    """Forget what was counted least where there is too much of it; returns whether that was so."""
    least = 1
    while len(counter) > _MOST:
        for value in [value for value, n in counter.items() if n <= least]:
            del counter[value]
        least *= 2
    return least > 1


# Examples -------------------------------------------------------------------------------------------------------------


def _collect(numbers: Numbers, part: Part, table: pa.Table, chosen: pa.Table, config: SelectConfig, most: int) -> None:
    """Offer the part's rows to the groups that they belong to, ordered by their ids, which is as good as random."""
    n = len(table)
    order = [int(i[:12], 16) for i in table["sample_id"].to_pylist()]
    row, kept = chosen["row"].to_numpy(), chosen["kept"].to_numpy()
    score = chosen["score"].to_numpy(zero_copy_only=False)
    source = np.asarray(chosen["text_source"].to_pylist(), dtype=object)
    reason = np.asarray(chosen["reason"].to_pylist(), dtype=object)
    fits = kept | np.isin(reason.astype(str), SPARED)
    has, fitting = {}, {}
    for kind, mine in (("web", source != "syn"), ("syn", source == "syn")):
        has[kind], fitting[kind] = np.zeros(n, bool), np.zeros(n, bool)
        has[kind][row[mine]] = True
        fitting[kind][row[mine & fits]] = True
    status = np.asarray(table["status"].to_pylist(), dtype=object)
    usable = np.isin(status.astype(str), USABLE)
    both = usable & has["web"] & has["syn"]
    for name, mine in (
        ("caption", both & ~fitting["web"] & fitting["syn"]),
        ("both", both & fitting["web"] & fitting["syn"]),
        ("web", both & fitting["web"] & ~fitting["syn"]),
        ("neither", both & ~fitting["web"] & ~fitting["syn"]),
        ("web alone", usable & has["web"] & ~has["syn"] & fitting["web"]),
        ("no web", usable & has["web"] & ~has["syn"] & ~fitting["web"]),
    ):
        _offer(numbers, name, np.flatnonzero(mine), order, part, most)
    if config.column == "itm" and config.policy not in ("rank-k", "fraction"):
        least = np.where(source == "syn", config.threshold(SYN), config.threshold(WEB))
        edge = np.abs(np.nan_to_num(score, nan=9) - least) < EDGE
        _offer(numbers, "edge", np.unique(row[edge]), order, part, most)
    by_rule = np.array([r.startswith("rule ") for r in reason], dtype=bool)
    _offer_scored(numbers, "lowest", row, score, kept & ~np.isnan(score), part, most)
    _offer_scored(numbers, "rules", row, -score, by_rule, part, most)
    for name in set(status[~usable].tolist()):
        _offer(numbers, f"status {name}", np.flatnonzero(status == name), order, part, most)


def _offer(numbers: Numbers, group: str, rows: np.ndarray, order: list[int], part: Part, most: int) -> None:
    smallest = heapq.nsmallest(most, ((order[r], part.pid, int(r)) for r in rows))
    if smallest:
        numbers.examples[group] = heapq.nsmallest(most, [*numbers.examples.get(group, []), *smallest])


def _offer_scored(numbers: Numbers, group: str, row: np.ndarray, score: np.ndarray, mask: np.ndarray, part: Part,
                  most: int) -> None:  # fmt: skip
    best: dict[int, float] = {}
    for r, s in zip(row[mask].tolist(), score[mask].tolist(), strict=True):
        if s == s:
            best[r] = min(s, best.get(r, s))
    smallest = heapq.nsmallest(most, ((s, part.pid, r) for r, s in best.items()))
    if smallest:
        numbers.examples[group] = heapq.nsmallest(most, [*numbers.examples.get(group, []), *smallest])


def _collect_repeated(run: Run, done: list[Part], numbers: Numbers, most: int) -> None:
    """Collect images with the most common synthetic caption, if it is common enough to be a fault."""
    ((caption, n),) = numbers.captions["syn"].most_common(1) or [("", 0)]
    if n < 3:
        return
    examples: list[tuple[Any, str, int]] = []
    for part in done[:200]:
        texts = run.parts.read(part.pid, ["syn_text"])["syn_text"].to_pylist()
        examples += [(i, part.pid, i) for i, row in enumerate(texts) if caption in (row or [])]
        if len(examples) >= most:
            break
    numbers.examples["commonest"] = examples[:most]


# The result -----------------------------------------------------------------------------------------------------------


def _null(run: Run) -> dict[str, Any]:
    """Read the histogram of mismatched pairs. DataError if it is not as it was written."""
    try:
        null = json.loads(run.storage.read(NULL))
        if len(null["histogram"]) != BINS + 1 or not all(
            isinstance(n, int) for n in (null["pairs"], *null["histogram"])
        ):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        again = run.command("calibrate", "--method", "null")
        raise DataError(f"{run.storage.root}/{NULL} is damaged; `{again}` writes it anew") from None
    return null


def summary(run: Run, config: SelectConfig, numbers: Numbers) -> dict[str, Any]:
    """Return the contents of report.json."""
    parts = len(scored_parts(run))
    rows = sum(numbers.account["rows_in"].values())
    null = _null(run) if run.storage.exists(NULL) else None
    return {
        "run": run.where,
        "fingerprint": run.fingerprint,
        "parts": parts,
        "parts_planned": len(run.plan),
        "rows": rows,
        "rows_planned": run.rows,
        "settings": dataclasses.asdict(config),
        **{key: dict(sorted(counts.items())) for key, counts in numbers.account.items()},
        "without_score": dict(sorted(numbers.unscored.items())),
        "thresholds": numbers.thresholds,
        "kept_at": {kind: counts.tolist() for kind, counts in sorted(numbers.kept_at.items())},
        "error_codes": dict(numbers.codes.most_common()),
        "rule_flags": dict(numbers.flags.most_common()),
        "histogram": {kind: counts.tolist() for kind, counts in numbers.histogram.items()},
        "null": null,
        "texts": {kind: _text_figures(numbers, kind) for kind in ("web", "syn")},
        "repeated": {
            kind: [[text, n] for text, n in numbers.captions[kind].most_common(20) if n > 1] for kind in ("web", "syn")
        },
        "shards": {name: dict(counts) for name, counts in sorted(numbers.shards.items())},
        "seconds": dict(numbers.seconds),
        "extra": {name: counts_of(run, name) for name in scorers_of(run)},
        "damaged": {s.relpath: s.damage for s in run.damaged()},
        "config": run.job["config"],
        "facts": facts_of(run.storage.read(name_of(scored_parts(run)[0].pid))) if parts else {},
    }


def _text_figures(numbers: Numbers, kind: str) -> dict[str, Any]:
    texts, words = numbers.texts[kind], numbers.word_count[kind]
    repeated = sum(n for n in numbers.captions[kind].values() if n > 1)
    return {
        "texts": texts,
        "different": len(numbers.captions[kind]),
        "words_each": round(words / texts, 2) if texts else None,
        "vocabulary": len(numbers.words[kind]),
        "share_repeated": round(repeated / texts, 4) if texts else None,
        "counts_are_partial": numbers.forgotten,
    }
