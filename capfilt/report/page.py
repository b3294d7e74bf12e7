"""The page of a report: what came in, what is kept at this and at other thresholds, and images with their texts."""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import blip
from blip.app import html
from blip.app.html import Figure, PageTable, charts
from capfilt.reading import Reader, shown_image
from capfilt.report import steps
from capfilt.report.counts import BINS, EDGE, Numbers, ReportOptions
from capfilt.run import Run
from capfilt.schema import FAULTS, USABLE
from capfilt.select.choose import Whole, select_part
from capfilt.select.policies import SelectConfig

_LIMIT = 4_500_000
"""Most bytes of images and texts on the page, so that all of it stays under 5 MB."""
_SIDE, _LONGEST = 224, 240
_DROPS = (
    *(
        "only",
        "least",
        "most",
        "rules",
        "duplicates",
        "duplicate_bits",
        "duplicate_cosine",
        "contamination",
        "shared",
        "human",
    ),
    *("concepts", "per_concept"),
)
"""Settings of a selection that drop texts whatever its policy says."""
_SHOWN = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
"""Thresholds in the table."""
SOURCES = {"web": "web texts", "syn": "generated captions", "human": "human captions"}
ONE = {"web": "web text", "syn": "generated caption", "human": "human caption"}
GROUPS = {
    "caption": ("The web text was wrong", "The filter rejects the web text and accepts the generated caption."),
    "both": ("Both fit", "The filter accepts the web text and the generated caption."),
    "web": ("The caption was wrong", "The filter accepts the web text and rejects the generated caption."),
    "neither": ("Nothing to keep", "The filter rejects the web text and the generated caption."),
    "web alone": ("The web text fits", "The filter accepts the web text; there is no generated caption."),
    "no web": ("The web text does not fit", "The filter rejects the web text; there is no generated caption."),
    "edge": ("On the edge", f"A score is within {EDGE:g} of the threshold."),
    "lowest": ("The lowest scores that are kept", "If these texts fit their images, the threshold could be lower."),
    "rules": ("Good scores that a rule drops", "If these texts fit their images, the rule may be too strict."),
    "commonest": ("One caption for many images", "Images with the most common generated caption."),
}
"""Heading and explanation of each group of example images, in the order of the page."""
_RANKED = {
    "caption": ("Only the caption is kept", "The generated caption ranks higher than the web text."),
    "both": ("Both are kept", "The web text and the generated caption rank high enough."),
    "web": ("Only the web text is kept", "The web text ranks higher than the generated caption."),
}
"""Headings where texts compete for their rank, which says nothing about what is wrong."""
STATUSES = {
    "ok": "Images with a web text",
    "no_text": "Images without a web text",
    "decode_error": "Files that could not be decoded",
    "truncated": "Cut-off files",
    "too_large": "Images over the limits of size",
    "no_image": "Rows without an image",
    "rule": "Images that a rule excludes",
    "gpu_oom": "Images for which the GPU's memory was too small",
    "crash": "Files that crashed the decoder",
    "timeout": "Files that took too long to decode",
    "score_invalid": "Images whose scores are not numbers",
    "source_error": "Files that could not be read",
}
"""Statuses of rows in words."""


class Fate(NamedTuple):
    """A text on a card with its fate at the selection's threshold and others."""

    label: str
    text: str
    kept: bool
    score: str
    reason: str
    above: int | None
    """It is kept at thresholds of the slider after this one, up to `upto`; None if the slider does not move it."""
    upto: int | None


class ImageCard(NamedTuple):
    """An image with the fates of its texts."""

    id: str
    image: str
    """Data URL; empty if there is none."""
    alt: str
    fates: Sequence[Fate]
    trouble: str
    origin: str


class Group(NamedTuple):
    """Example images under a heading."""

    heading: str
    intro: str
    cards: list[ImageCard]


def render(run: Run, numbers: Numbers, report: dict[str, Any], cards: Cards, options: ReportOptions) -> str:
    """Render the page as HTML, under 5 MB."""
    texts_in, kept = report["texts_in"], report["kept"]
    is_rehearsal = run.config.scorer == "fake"
    title = options.title or f"{report['rows']:,} web images in, {_amount(sum(kept.values()), 'text')} kept"
    if is_rehearsal:
        title = f"Rehearsal: {title}"
    usable = sum(report["rows_in"].get(name, 0) for name in USABLE)
    faults = {name: n for name, n in report["rows_in"].items() if name in FAULTS}
    figures = [Figure(f"{usable:,}", "images with scores", f"of {report['rows']:,}")]
    figures += [
        Figure(_share(kept.get(kind, 0), n), f"of the {SOURCES[kind]} kept", f"{kept.get(kind, 0):,} of {n:,}")
        for kind, n in sorted(texts_in.items(), key=lambda item: [*SOURCES].index(item[0]))
    ][:2]
    figures.append(Figure(f"{sum(faults.values()):,}", "rows that could not be used", _faults(faults)))
    data = {
        "title": title,
        "kind": f"CapFilt report · {run.where} · {f'selection {options.select}' if options.select else 'no selection'}",
        "lead": _lead(report),
        "figures": figures,
        "alert": "These scores are made up (--scorer fake): a rehearsal of the run, not a judgement of the texts."
        if is_rehearsal else "",
        "trained_on": json.loads(report["facts"].get("trained_on", "[]")),
        "warnings": _warnings(report),
        "slider": _slider(report),
        "histograms": _histograms(report),
        "note": _note(report),
        "run": shlex.quote(report["run"]),
        "tables": [table for table in _tables(report) if table.rows],
        "blur": not options.no_blur,
        "policy_text": _policy(report["settings"]),
    }  # fmt: skip
    room = _LIMIT - len(html.page("capfilt.html", scripts=["capfilt.js"], groups=[], **data))
    groups = _groups(cards, numbers, report["settings"]["policy"], room)
    return html.page("capfilt.html", scripts=["capfilt.js"], groups=groups, **data)


def _cut(text: str, most: int = _LONGEST) -> str:
    return html.cut(text, most)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _amount(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _inside(words: str) -> str:
    """Spell words for the middle of a sentence."""
    return words[:1].lower() + words[1:]


def _faults(faults: dict[str, int]) -> str:
    most = sorted(faults.items(), key=lambda one: -one[1])[:2]
    return ", ".join(f"{n:,} {_inside(STATUSES.get(name, name))}" for name, n in most)


def _lead(report: dict[str, Any]) -> str:
    made = "A captioner generated a caption for every image; a filter compared it and the web text with the image."
    if "syn" not in report["texts_in"]:
        made = "A filter compared every web text with its image."
    but = ", but for those that another setting of the selection drops" if _drops(report["settings"]) else ""
    return f"{made} Kept are {_kept_in_words(report['settings'])}{but}."


def _kept_in_words(settings: dict[str, Any]) -> str:
    least = f"with a probability of a match of at least {settings['itm']:g}"
    if settings["policy"] == "rank-k":
        return f"the best {_amount(settings['k'], 'text')} of each image"
    if settings["policy"] == "fraction":
        return f"the best {100 * settings['fraction']:g}% of all texts"
    if settings["by"] not in (None, "itm"):
        return f"texts whose {settings['by']} is high enough"
    if settings["itm_web"] is not None or settings["itm_syn"] is not None:
        web, syn = (settings["itm"] if settings[n] is None else settings[n] for n in ("itm_web", "itm_syn"))
        least = f"with a probability of a match of at least {web:g} (web) or {syn:g} (generated)"
    if settings["policy"] == "web-else-syn":
        return f"web texts {least}, and where there is none, the best generated caption that reaches it"
    return f"all texts {least}"


def _warnings(report: dict[str, Any]) -> list[str]:
    warnings = []
    if report["parts"] < report["parts_planned"]:
        warnings.append(f"Only {report['parts']:,} of {report['parts_planned']:,} parts are scored.")
    return warnings + [f"{name}: {damage}" for name, damage in list(report["damaged"].items())[:10]]


def _policy(settings: dict[str, Any]) -> str:
    """Format the settings of a selection that its policy uses."""
    used = {"rank-k": ("by", "k"), "fraction": ("by", "fraction")}.get(
        settings["policy"], ("by", "itm", "itm_web", "itm_syn")
    )
    named = {name: settings[name] for name in used if settings[name] is not None}
    named |= _drops(settings)
    each = [(name, one) for name, value in named.items() for one in (value if isinstance(value, list) else [value])]
    return ", ".join([settings["policy"], *(f"{name} {one}" for name, one in each)])


def _drops(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a selection that drop texts whatever its policy says, those that are used."""
    used = {name: settings[name] for name in _DROPS if settings.get(name)}
    for name, kind in (("duplicate_bits", "phash64"), ("duplicate_cosine", "embedding")):
        if settings["duplicates"] != kind:
            used.pop(name, None)
    return used


# The threshold --------------------------------------------------------------------------------------------------------


def _slider(report: dict[str, Any]) -> dict[str, Any] | None:
    """Contents of the slider: its thresholds, counts, the one that the selection has, and the command for another."""
    if report["thresholds"] is None:
        return None
    settings = report["settings"]
    words = ["capfilt", "select", report["run"], "--name", "NAME", "--policy", settings["policy"]]
    for name, value in (_drops(settings) | {n: settings[n] for n in ("itm_web", "itm_syn")}).items():
        for one in value if isinstance(value, list) else [value] * (value is not None):
            words += [f"--{name.replace('_', '-')}", str(one)]
    return {
        "thresholds": report["thresholds"],
        "now": report["thresholds"].index(settings["itm"]),
        "kinds": [
            {"name": SOURCES[kind], "texts": report["texts_in"][kind], "kept": report["kept_at"][kind]}
            for kind in SOURCES
            if kind in report["texts_in"]
        ],
        "command": shlex.join(words) + " --itm",
    }


def _histograms(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    series = {kind: counts for kind, counts in report["histogram"].items() if sum(counts)}
    drawn = []
    for kind, bins in series.items():
        at = settings[f"itm_{kind}"] if settings[f"itm_{kind}"] is not None else settings["itm"]
        is_cut = settings["policy"] not in ("rank-k", "fraction") and settings["by"] in (None, "itm")
        moves = report["thresholds"] is not None and settings[f"itm_{kind}"] is None
        name = f"Scores of the {SOURCES[kind]}"
        drawn.append(charts.histogram(name, bins, kind, at if is_cut else None, moves=moves))
    if report["null"]:
        bins = np.array(report["null"]["histogram"]).reshape(-1)[: BINS + 1].tolist()
        drawn.append(charts.histogram("Scores of captions shuffled among images", bins, "c5"))
    return drawn


def _note(report: dict[str, Any]) -> str:
    """Say how to read the chart of shuffled captions, if there is one."""
    if report["null"]:
        return (
            "The grey chart is for captions shuffled among images: the filter's scores of texts that do not match. "
            "It is a lower bound on the noise, not an estimate: near misses score far higher."
        )
    return ""


def _thresholds(report: dict[str, Any]) -> PageTable:
    """What other thresholds keep, of all texts in; those without a score have a row of their own."""
    kinds = [kind for kind in SOURCES if kind in report["texts_in"]]
    head = ["threshold", *(name for kind in kinds for name in (f"{SOURCES[kind]} kept", "of all"))]
    rows: list[list[Any]] = []
    if report["thresholds"]:
        shown = sorted({*_SHOWN, report["settings"]["itm"]})
        for value in (value for value in shown if value in report["thresholds"]):
            at = report["thresholds"].index(value)
            kept = {kind: report["kept_at"].get(kind, [0] * (at + 1))[at] for kind in kinds}
            rows.append([f"{value:g}", *_with_shares(kept, report["texts_in"])])
    lacking = {kind: report["without_score"].get(kind, 0) for kind in kinds}
    rows.append(["without a score", *_with_shares(lacking, report["texts_in"])])
    return PageTable("What other thresholds would keep", head, rows)


def _with_shares(numbers: dict[str, int], texts_in: dict[str, int]) -> list[Any]:
    return [value for kind, n in numbers.items() for value in (n, _share(n, texts_in[kind]))]


# The tables -----------------------------------------------------------------------------------------------------------


def _tables(report: dict[str, Any]) -> list[PageTable]:
    rows = [[STATUSES.get(name, name), n, _share(n, report["rows"])] for name, n in report["rows_in"].items()]
    texts = [_account_row(report, kind) for kind in SOURCES if kind in report["texts_in"]]
    totals = [sum(report[key].values()) for key in ("texts_in", "kept", "dropped", "without_score")]
    reasons = sorted(report["reasons"].items(), key=lambda one: -one[1])
    tables = [
        PageTable("Every row of the input, once", ["rows", "number", "share"], [*rows, ["All", report["rows"], ""]]),
        PageTable(
            "Every text, once",
            ["texts", "in", "kept", "dropped", "of which without a score", "kept of all"],
            [*texts, ["all", *totals, _share(totals[1], totals[0])]],
        ),
        PageTable("Why texts are kept or dropped", ["reason", "texts"], reasons),
        _thresholds(report),
        _texts(report),
    ]
    tables += [
        PageTable(f"The most common {SOURCES[kind]}", ["text", "times"], [[_cut(t), n] for t, n in most])
        for kind, most in report["repeated"].items()
    ]
    return [
        *tables,
        _further(report),
        _concepts(report),
        _shards(report),
        PageTable("Errors", ["error code", "rows"], list(report["error_codes"].items())[:30]),
        PageTable("Rules broken", ["rule", "rows"], list(report["rule_flags"].items())[:30]),
        _made(report),
    ]


def _account_row(report: dict[str, Any], kind: str) -> list[Any]:
    n, kept = report["texts_in"][kind], report["kept"].get(kind, 0)
    lacking = report["without_score"].get(kind, 0)
    return [SOURCES[kind], n, kept, report["dropped"].get(kind, 0), lacking, _share(kept, n)]


def _texts(report: dict[str, Any]) -> PageTable:
    head = ["texts", "number", "different", "words each", "vocabulary", "in more than one image"]
    rows = []
    for kind, one in report["texts"].items():
        words = None if one["words_each"] is None else f"{one['words_each']:.1f}"
        repeated = None if one["share_repeated"] is None else f"{one['share_repeated']:.1%}"
        rows.append([SOURCES[kind], one["texts"], one["different"], words, one["vocabulary"], repeated])
    return PageTable("Properties of the texts", head, rows)


def _further(report: dict[str, Any]) -> PageTable:
    head = ["scorer", "rows", "of these with scores", "not shown to it", "errors"]
    return PageTable("Scores of further scorers", head, [
        [name, n["rows"], n["scored"], n["not_scored"], n["raised"]] for name, n in report["extra"].items()
    ])  # fmt: skip


def _concepts(report: dict[str, Any]) -> PageTable:
    concepts = report["concepts"]
    if not concepts:
        return PageTable("", [], [])
    name = f"The most frequent concepts ({concepts['present']:,} of {concepts['listed']:,} are in some text)"
    return PageTable(name, ["concept", "texts", "kept"], [[_cut(c), n, kept] for c, n, kept in concepts["most"]])


def _shards(report: dict[str, Any]) -> PageTable:
    def badness(item: tuple[str, dict]) -> float:
        counts = item[1]
        return -counts["errors"] / counts["rows"] + counts.get("web_kept", 0) / (counts.get("web") or 1)

    worst = sorted(report["shards"].items(), key=badness)[:25]
    rows = [
        [_cut(name), c["rows"], _share(c["errors"], c["rows"]), *(_share(c.get(f"{kind}_kept", 0), c.get(kind, 0))
                                                                 for kind in ("web", "syn"))]
        for name, c in worst
    ]  # fmt: skip
    more = len(report["shards"]) - len(worst)
    name = "Input files, the worst first" + (f" ({more:,} more are in report.json)" if more else "")
    return PageTable(name, ["file", "rows", "not usable", "web texts kept", "generated captions kept"], rows)


def _made(report: dict[str, Any]) -> PageTable:
    rows = [[f"speed on {device}", f"{report['rows'] / s:,.1f} rows a second"]
            for device, s in report["seconds"].items() if s]  # fmt: skip
    rows.append(["version", f"openblip {blip.__version__}"])
    rows.append(["selection", _policy(report["settings"])])
    rows += [[name, _cut(one if isinstance(one, str) else json.dumps(one))] for name, one in report["config"].items()]
    rows += [[name, _cut(value)] for name, value in report["facts"].items() if name not in report["config"]]
    return PageTable("How this was made", ["setting", "value"], rows)


# Images ---------------------------------------------------------------------------------------------------------------


def _groups(cards: Cards, numbers: Numbers, policy: str, room: int) -> list[Group]:
    """Example images by group, up to the size limit."""
    headings = GROUPS | (_RANKED if policy == "rank-k" else {})
    names = [name for name in headings if name in numbers.examples]
    groups = []
    for name in [*names, *sorted(set(numbers.examples) - set(names))]:
        status = name.removeprefix("status ")
        heading, intro = headings.get(name) or (STATUSES.get(status, status), "They have no scores.")
        shown: list[ImageCard] = []
        for _, pid, row in numbers.examples[name]:
            card = cards.card(pid, row, numbers.thresholds)
            room -= _size(card)
            if room < 0:
                break
            shown.append(card)
        if shown:
            groups.append(Group(heading, intro, shown))
    return groups


def _size(card: ImageCard) -> int:
    """Most bytes that a card takes on the page; an escaped character takes up to six."""
    texts = [card.id, card.alt, card.trouble, card.origin, *(word for fate in card.fates for word in fate[1:5:3])]
    return len(card.image) + sum(len(text.encode("utf-8", "replace")) + 5 * sum(map(text.count, "&<>\"'"))
                                 for text in texts) + 700 + 500 * len(card.fates)  # fmt: skip


class Cards:
    """Cards of rows; caches the parts it has read as tables, which take a quarter of the memory of Python rows."""

    def __init__(self, run: Run, config: SelectConfig, whole: Whole) -> None:
        self.run, self.config, self.whole = run, config, whole
        self.parts = {part.pid: part for part in run.plan}
        self._texts: dict[str, pa.Table] = {}
        self._notes: dict[str, pa.Table] = {}

    def card(self, pid: str, row: int, thresholds: list[float] | None = None) -> ImageCard:
        note, texts = self._note(pid, row), self._fates(pid, thresholds)
        fates = [_fate(text) for text in texts.filter(pc.equal(texts["row"], row)).to_pylist()]
        trouble = "" if note["status"] in USABLE else f"{STATUSES[note['status']]}: {note['error_detail'] or ''}"
        image = self.image(pid, row)
        if not image and not trouble:
            trouble = "the image no longer exists"
        origin = f"{note['source_uri']}:{note['source_row']} {note['key']}"
        return ImageCard(note["sample_id"], image, _cut(note["key"]), fates, _cut(trouble), _cut(origin))

    def _note(self, pid: str, row: int) -> dict[str, Any]:
        """Return the annotation of a row."""
        if pid not in self._notes:
            self._notes[pid] = self.run.parts.read(pid)
        return self._notes[pid].slice(row, 1).to_pylist()[0]

    def _fates(self, pid: str, thresholds: list[float] | None) -> pa.Table:
        """Return the texts of a part with their fates, and with the thresholds that would keep them."""
        if pid not in self._texts:
            account: dict[str, Counter] = defaultdict(Counter)
            chosen = select_part(self.run, self.parts[pid], self.config, self.whole, account)
            spans = thresholds and steps.ranges(chosen, self.config, thresholds)
            for name in ("above", "upto"):
                values = pa.array(getattr(spans, name)) if spans else pa.nulls(len(chosen), pa.int64())
                chosen = chosen.append_column(name, values)
            self._texts[pid] = chosen
        return self._texts[pid]

    def image(self, pid: str, row: int) -> str:
        """Return a thumbnail of a row's image as a data URL; empty if there is none."""
        note = self._note(pid, row)
        if note["status"] not in USABLE:
            return ""
        reader = Reader(self.run.sources[self.parts[pid].source], self.run.reading, self.run.storage)
        image = shown_image(reader, note["source_row"], self.run.config.max_pixels, _SIDE)
        return html.thumbnail(image, min(_SIDE, max(image.size)), 60) if image is not None else ""


def _fate(text: dict[str, Any]) -> Fate:
    score = "" if text["score"] is None else f"{text['score']:.3f}"
    reason = text["reason"].removeprefix("itm ")
    return Fate(ONE[text["text_source"]], _cut(text["text"]), text["kept"], score, reason, text["above"], text["upto"])
