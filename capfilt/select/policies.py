"""Policies that choose texts by their scores: pure functions of arrays, one entry per text.

N texts. A policy gets the texts of complete rows, in order, each row's web texts before its synthetic ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from blip.options import option
from capfilt.select.phash import MOST
from capfilt.settings import at_least

if TYPE_CHECKING:
    from capfilt.select.conditions import Condition

WEB, SYN, HUMAN = 0, 1, 2
SOURCES = ("web", "syn", "human")
SPARED = ("the web text passes", "a better synthetic text passes")
"""Reasons of web-else-syn to drop a text that passes."""


@dataclass(frozen=True)
class SelectConfig:
    """Settings of a selection: which texts it keeps."""

    policy: Literal["blip", "rank-k", "web-else-syn", "threshold-table", "fraction"] = "blip"
    """Policy. blip: each text by itself; rank-k: the best k of a row; web-else-syn: a synthetic text only if no web
    text passes; threshold-table: separate thresholds for web and synthetic texts; fraction: the best share of all."""
    itm: float = 0.5
    """Lowest score of a kept text."""
    itm_web: float | None = None
    """Lowest score of kept web texts (default: `itm`)."""
    itm_syn: float | None = None
    """Lowest score of kept synthetic texts (default: `itm`)."""
    by: Literal["itm", "margin", "itc"] | None = None
    """Score to compare: P(match), the logit difference, or the cosine (default: itc for rank-k, itm for all others)."""
    k: int = 1
    """Texts per row that rank-k keeps."""
    fraction: float = 0.3
    """Share of the scored texts that fraction keeps."""
    only: list[str] = option(list, metavar="WHAT", repeat=True)
    """Keep texts of one source only, the crawl's own (web) or the synthetic ones (syn), or with one of some values of a
    further scorer: SCORER.COLUMN=VALUE,VALUE, such as language.web=en,de; may be repeated. Without a value a text is
    dropped."""
    least: list[str] = option(list, metavar="SCORER.COLUMN=NUMBER", repeat=True)
    """Keep texts with at least this score of a further scorer, such as aesthetic.score=5; may be repeated. Without a
    score a text is dropped."""
    most: list[str] = option(list, metavar="SCORER.COLUMN=NUMBER", repeat=True)
    """Keep texts with at most this score of a further scorer, such as one of unsafe images; may be repeated. Without a
    score a text is dropped."""
    rules: str | None = None
    """Preset of rules that also drop: align, datacomp-basic, laion or junk."""
    duplicates: Literal["sha256", "phash64", "embedding"] | None = None
    """Of images with the same bytes (sha256), the same appearance (phash64) or a near embedding (`score --also
    embedding`), keep the texts of the first only."""
    duplicate_bits: int = 0
    """Most bits, of 64, in which perceptual hashes of copies may differ; 2 to 4 also finds other sizes and qualities
    of an image."""
    duplicate_cosine: float = 0.995
    """Least cosine of the embeddings of copies."""
    contamination: str | None = None
    """Images that must not be used, such as a test set's: a file of SHA-256 or perceptual hashes in hex, one per line,
    or a run that has scored them (`--scorer fake` is enough)."""
    shared: int | None = None
    """Drop web texts that more images than this share; ALIGN takes 10."""
    concepts: str | None = None
    """Balance the texts over concepts: a file with one concept, of whole words, per line. Texts without one are
    dropped."""
    per_concept: int | None = None
    """Texts per concept to aim at: of N, a text with a concept that C texts have is kept with probability N / C."""
    human: str | None = None
    """Pattern of input files with human captions: all of them are kept, and no synthetic texts of their images."""

    def __post_init__(self) -> None:
        if not isinstance(self.only, list):  # as accounts had it when there was one value
            object.__setattr__(self, "only", [self.only] if self.only else [])
        if {*self.sources, *SOURCES[:2]} == {*self.sources}:
            raise ValueError("only web and only syn together leave no text; give one of them")
        self.conditions()
        if not 0 < self.duplicate_cosine <= 1:
            raise ValueError(f"duplicate_cosine must be in (0, 1], got {self.duplicate_cosine}")
        if (self.concepts is None) != (self.per_concept is None):
            raise ValueError("--concepts and --per-concept belong together: give both")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        for name in ("itm", "itm_web", "itm_syn"):
            self._check_threshold(name, getattr(self, name))
        at_least(1, k=self.k, shared=self.shared, per_concept=self.per_concept)
        if not 0 <= self.duplicate_bits <= MOST:
            raise ValueError(f"duplicate_bits must be 0 to {MOST}, got {self.duplicate_bits}")
        if self.policy == "threshold-table" and (self.itm_web is None or self.itm_syn is None):
            raise ValueError("policy threshold-table needs --itm-web and --itm-syn")
        if self.rules:
            from capfilt.select.rules import check_preset

            check_preset(self.rules)

    def _check_threshold(self, name: str, value: float | None) -> None:
        """Check the range of a threshold: 0 to 1 for probabilities, -1 to 1 for cosines, any for logit differences."""
        low, high = {"itm": (0, 1), "itc": (-1, 1), "margin": (-math.inf, math.inf)}[self.column]
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            what = {"itm": "a probability, 0 to 1", "itc": "a cosine, -1 to 1", "margin": "a number"}[self.column]
            raise ValueError(f"{name} {value:g}: with --by {self.column} a threshold is {what}")

    @property
    def sources(self) -> list[str]:
        """Return which of web and syn are the only sources; none if both are kept."""
        return [one for one in self.only if one in SOURCES[:2]]

    def conditions(self) -> list[Condition]:
        """Return the conditions on scores of further scorers."""
        from capfilt.select.conditions import parse_bounds, parse_only

        only = [one for one in self.only if one not in SOURCES[:2]]
        return parse_bounds(self.least, "least") + parse_bounds(self.most, "most") + parse_only(only)

    @property
    def column(self) -> str:
        return self.by or ("itc" if self.policy == "rank-k" else "itm")

    def threshold(self, source: int) -> float:
        own = self.itm_web if source == WEB else self.itm_syn
        return self.itm if own is None else own


class Texts(NamedTuple):
    """Rows, sources and scores of the texts that may be kept, each (N,)."""

    row: np.ndarray
    source: np.ndarray
    score: np.ndarray


class Decisions(NamedTuple):
    """Whether each text is kept, the reason as an index into `reasons`, and the text's rank in its row or -1."""

    kept: np.ndarray
    reason: np.ndarray
    reasons: list[str]
    rank: np.ndarray


def choose(texts: Texts, config: SelectConfig, cut: float | None) -> Decisions:
    """Apply the policy; `cut` is the threshold of `fraction` over all texts."""
    return _POLICIES[config.policy](texts, config, cut)


def _passes(texts: Texts, config: SelectConfig) -> Decisions:
    name, web, syn = config.column, config.threshold(WEB), config.threshold(SYN)
    kept = texts.score >= np.where(texts.source == WEB, web, syn)
    reasons = [f"{name} below {web:g}", f"{name} at least {web:g}", f"{name} below {syn:g}", f"{name} at least {syn:g}"]
    return Decisions(kept, kept + 2 * (texts.source != WEB), reasons, np.full(len(kept), -1))


def _blip(texts: Texts, config: SelectConfig, cut: float | None) -> Decisions:
    return _passes(texts, config)


def _ranks(texts: Texts) -> np.ndarray:
    """Rank each text within its row, 0 the best; of equal scores the first."""
    order = np.lexsort((np.arange(len(texts.row)), -texts.score, texts.row))
    rows = texts.row[order]
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]) if len(rows) else np.zeros(0, int)
    place = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
    ranks = np.empty(len(rows), dtype=np.int64)
    ranks[order] = place
    return ranks


def _rank_k(texts: Texts, config: SelectConfig, cut: float | None) -> Decisions:
    ranks = _ranks(texts)
    kept = ranks < config.k
    name = config.column
    return Decisions(
        kept, kept.astype(int), [f"not of the best {config.k} by {name}", f"of the best {config.k} by {name}"], ranks
    )


def _web_else_syn(texts: Texts, config: SelectConfig, cut: float | None) -> Decisions:
    verdict = _passes(texts, config)
    rows = int(texts.row.max()) + 1 if len(texts.row) else 0
    web_passed = np.zeros(rows, dtype=bool)
    web_passed[texts.row[verdict.kept & (texts.source == WEB)]] = True
    spare = verdict.kept & (texts.source == SYN) & web_passed[texts.row]
    ranks = _ranks(texts)
    syn_kept = verdict.kept & (texts.source == SYN) & ~spare
    # Of several synthetic texts that pass, only the best replaces the web text.
    best = np.full(rows, np.iinfo(np.int64).max)
    np.minimum.at(best, texts.row[syn_kept], ranks[syn_kept])
    second = syn_kept & (ranks != best[texts.row])
    reason = np.where(spare, 4, np.where(second, 5, verdict.reason))
    reasons = [*verdict.reasons, *SPARED]
    return Decisions(verdict.kept & ~spare & ~second, reason, reasons, ranks)


def _fraction(texts: Texts, config: SelectConfig, cut: float | None) -> Decisions:
    kept = texts.score >= (np.inf if cut is None else cut)
    best = f"the best {config.fraction:g} by {config.column}"
    return Decisions(kept, kept.astype(int), [f"not of {best}", f"of {best}"], np.full(len(kept), -1))


def cut_of(scores: np.ndarray, fraction: float) -> float | None:
    """Lowest score among the best `fraction` of all scores; None if that share is empty."""
    keep = int(fraction * len(scores))
    if not keep:
        return None
    return float(np.partition(scores, len(scores) - keep)[len(scores) - keep])


_POLICIES: dict[str, Callable[[Texts, SelectConfig, float | None], Decisions]] = {
    "blip": _blip,
    "threshold-table": _blip,
    "rank-k": _rank_k,
    "web-else-syn": _web_else_syn,
    "fraction": _fraction,
}
