"""A run in the browser: rows filtered by score, rule, shard, text, status, source and verdict, read part by part."""

from __future__ import annotations

import io
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip.app import html
from blip.app.html.serve import PageServer
from capfilt.reading import Reader, shown_image
from capfilt.report.page import ONE
from capfilt.report.page import STATUSES as IN_WORDS
from capfilt.run import Part, Run
from capfilt.schema import STATUSES, USABLE
from capfilt.select.choose import read_account, scored_parts, select_part, survey
from capfilt.select.policies import SelectConfig

_CARDS = 60
"""Rows that one request returns."""
_SECONDS = 2.0
"""Longest that one request searches before it returns what it has found."""
_SIDE = 320
_NOTES = [
    "sample_id",
    "source_uri",
    "source_row",
    "key",
    "status",
    "error_code",
    "error_detail",
    "rule_flags",
    "width",
    "height",
]
_WORDS = ONE | IN_WORDS
_CHOICES = {"source": ("web", "syn", "human"), "verdict": ("kept", "dropped"), "status": STATUSES}


class Inspection:
    """Scored rows of a run with the verdict on each text, of a selection or of P(match) of at least 0.5."""

    def __init__(self, run: Run, selection: str | None = None) -> None:
        """ValueError if nothing is scored, or if there is no such selection."""
        self.run, self.parts = run, scored_parts(run)
        if not self.parts:
            raise ValueError(f"{run.where}: nothing is scored yet; run `{run.command('score')}` first")
        self.config = SelectConfig(**(read_account(run, selection)["settings"] if selection else {}))
        self.whole = survey(run, self.parts, self.config)
        self.selection = selection
        self._numbers = {part.pid: number for number, part in enumerate(self.parts)}

    def page(self, _: Mapping[str, Any]) -> str:
        """Render the page, which asks for cards."""
        rows = sum(part.rows for part in self.parts)
        verdicts = f"the selection “{self.selection}”" if self.selection else "a probability of a match of at least 0.5"
        return html.page(
            "inspect.html", title=f"{rows:,} rows of {self.run.where}", kind="CapFilt run",
            lead=f"Every text with its score, kept or dropped by {verdicts}.", scripts=("inspect.js",),
            allow={"connect-src": "'self'", "img-src": "'self' data:"},
            choices={name: [(one, _WORDS.get(one, one)) for one in values] for name, values in _CHOICES.items()},
            shards=sorted({part.source for part in self.parts})[:2000],
        )  # fmt: skip

    def image(self, given: Mapping[str, Any]) -> bytes:
        """Read the image of row `row` of part `pid` as a JPEG. LookupError if there is none."""
        number = self._numbers.get(given.get("pid", ""))
        row = given.get("row", "")
        if number is None or not row.isdecimal() or len(row) > 9 or int(row) >= self.parts[number].rows:
            raise LookupError("no such row")
        part = self.parts[number]
        reader = Reader(self.run.sources[part.source], self.run.reading, self.run.storage)
        image = shown_image(reader, part.lo + int(row), self.run.config.max_pixels, _SIDE)
        if image is None:
            raise LookupError("the image cannot be read")
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    def cards(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Find the next rows that fit the filters.

        Filters are source, verdict, status, least and most (scores), and parts of rule, shard and text, in any case.
        `after` is "PART:ROW", where the answer of before ended. Returns `cards`, `after` (empty at the end) and
        how many parts of how many have been searched. ValueError for a wrong filter.
        """
        wanted = _Filters(given)
        number, row = _place(str(given.get("after") or "0:0"), len(self.parts))
        cards: list[dict[str, Any]] = []
        began = time.monotonic()
        while number < len(self.parts):
            matching = self._matching(self.parts[number], wanted, row, _CARDS - len(cards) + 1)
            cards += matching
            if len(cards) > _CARDS:
                row = cards.pop()["row"]
                break
            number, row = number + 1, 0
            if time.monotonic() - began > _SECONDS:
                break
        over = number >= len(self.parts)
        return {
            "cards": cards,
            "after": "" if over else f"{number}:{row}",
            "searched": number,
            "parts": len(self.parts),
        }

    def _matching(self, part: Part, wanted: _Filters, start: int, most: int) -> list[dict[str, Any]]:
        notes = self.run.parts.read(part.pid, _NOTES)
        account: dict[str, Counter] = defaultdict(Counter)
        texts = select_part(self.run, part, self.config, self.whole, account)
        rows = np.flatnonzero(wanted.of_rows(notes) & (np.arange(len(notes)) >= start))
        if wanted.about_texts:
            fitting = texts["row"].to_numpy()[wanted.of_texts(texts)]
            rows = rows[np.isin(rows, fitting)]
        rows = rows[:most]
        shown = notes.take(pa.array(rows)).to_pylist()
        mine = texts.filter(pc.is_in(texts["row"], pa.array(rows, pa.int32())))
        of_row: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for text in mine.select(["row", "text", "text_source", "score", "kept", "reason"]).to_pylist():
            shown_text = {"text": html.cut(text["text"] or ""), "label": ONE[text["text_source"]]}
            of_row[text.pop("row")].append(text | shown_text)
        return [
            {
                "pid": part.pid,
                "row": int(row),
                "key": html.cut(note["key"] or ""),
                "where": html.cut(f"{note['source_uri']}:{note['source_row']}"),
                "status": _WORDS[note["status"]],
                "detail": html.cut(" ".join(filter(None, [note["error_code"], note["error_detail"]]))),
                "rules": note["rule_flags"] or [],
                "image": note["status"] in USABLE,
                "texts": of_row[int(row)],
            }
            for row, note in zip(rows, shown, strict=True)
        ]


class _Filters:
    """What a request asks for."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = {name: str(value).strip() for name, value in given.items() if str(value).strip()}
        for name, choices in _CHOICES.items():
            if self.given.get(name, choices[0]) not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, not {self.given[name]!r}")
        self.least, self.most = (self._number(name) for name in ("least", "most"))

    @property
    def about_texts(self) -> bool:
        return any(name in self.given for name in ("source", "verdict", "least", "most", "text"))

    def of_rows(self, notes: pa.Table) -> np.ndarray:
        """Mark the rows of a part that fit."""
        fits = np.ones(len(notes), dtype=bool)
        if "status" in self.given:
            fits &= _mask(pc.equal(notes["status"], self.given["status"]))
        if "shard" in self.given:
            fits &= _mask(pc.match_substring(notes["source_uri"], self.given["shard"], ignore_case=True))
        if "rule" in self.given:
            flags = pc.binary_join(notes["rule_flags"], "\n")
            fits &= _mask(pc.match_substring(flags, self.given["rule"], ignore_case=True))
        return fits

    def of_texts(self, texts: pa.Table) -> np.ndarray:
        """Mark the texts of a part that fit."""
        fits = np.ones(len(texts), dtype=bool)
        if "source" in self.given:
            fits &= _mask(pc.equal(texts["text_source"], self.given["source"]))
        if "verdict" in self.given:
            fits &= texts["kept"].to_numpy() == (self.given["verdict"] == "kept")
        if self.least is not None:
            fits &= _mask(pc.greater_equal(texts["score"], pa.scalar(self.least, pa.float32())))
        if self.most is not None:
            fits &= _mask(pc.less_equal(texts["score"], pa.scalar(self.most, pa.float32())))
        if "text" in self.given:
            fits &= _mask(pc.match_substring(texts["text"], self.given["text"], ignore_case=True))
        return fits

    def _number(self, name: str) -> float | None:
        if name not in self.given:
            return None
        try:
            return float(self.given[name])
        except ValueError:
            raise ValueError(f"{name} is a number, not {self.given[name]!r}") from None


def _mask(fits: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(fits, False).to_numpy().astype(bool)


def _place(after: str, parts: int) -> tuple[int, int]:
    number, _, row = after.partition(":")
    if not (number.isdecimal() and row.isdecimal() and len(after) < 24 and int(number) <= parts):
        raise ValueError(f"after is PART:ROW, not {after!r}")
    return int(number), int(row)


def inspect(run: Run, selection: str | None = None, port: int = 0) -> PageServer:
    """Return a server of the page. ValueError as `Inspection`."""
    inspection = Inspection(run, selection)
    return PageServer({"GET /": inspection.page, "GET /cards": inspection.cards, "GET /image": inspection.image}, port)
