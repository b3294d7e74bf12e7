"""The page of a report: one file that loads nothing and can be read without scripts.

Texts of a crawl are hostile: everything is escaped, and the page's own policy forbids all but its own script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter, defaultdict
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip.app.page import STYLE
from blip.data.images import model_input, small
from capfilt import __version__
from capfilt.reading import Reader
from capfilt.report.counts import BINS, Numbers, ReportOptions
from capfilt.run import Run
from capfilt.schema import USABLE
from capfilt.select.choose import Whole, select_part
from capfilt.select.policies import SelectConfig

_LIMIT = 4_500_000
"""Most bytes of images and texts on the page, so that all of it stays under 5 MB."""
_SIDE, _LONGEST = 160, 240
_DROPS = ("rules", "duplicates", "duplicate_bits", "contamination", "shared", "human", "only", "least", "concepts")
"""Settings of a selection that drop texts whatever its policy says."""
_MORE = """
.card img{height:160px;object-fit:contain;background:#f1f5f9}.blur img{filter:blur(9px)}.blur img:hover,
body:has(#clear:checked) .blur img{filter:none}.text{margin:6px 0;padding:4px 8px;border-left:4px solid #94a3b8;
overflow-wrap:anywhere}.text.kept{border-color:#059669;background:#ecfdf5}.text.dropped{border-color:#dc2626;
background:#fef2f2}.why{display:block;font-size:12px;color:#475569}.from{font-size:11px;color:#64748b;
overflow-wrap:anywhere}.kept b{color:#047857}.dropped b{color:#b91c1c}.bar{display:inline-block;height:10px;
background:#94a3b8;vertical-align:middle}.num td+td,.num th+th{text-align:right;font-variant-numeric:tabular-nums}
.warn{background:#fffbeb;border:1px solid #f59e0b;padding:8px 12px;border-radius:6px}
.side{display:flex;flex-wrap:wrap;gap:8px 40px;align-items:flex-start}h3{font-size:15px;margin:20px 0 6px}
#slider{width:100%;max-width:560px}code{overflow-wrap:anywhere}
"""
_SCRIPT = """
const data=JSON.parse(document.getElementById('histogram').textContent);
const slider=document.getElementById('slider'),out=document.getElementById('counts');
const n=x=>x.toLocaleString('en');
function show(){const t=+slider.value;const parts=[];let pairs=0;
for(const kind of ['web','syn']){const h=data[kind],all=h.reduce((a,b)=>a+b,0);
const kept=h.slice(t).reduce((a,b)=>a+b,0);pairs+=kept;
const share=all?' ('+(100*kept/all).toFixed(1)+'%)':'';
parts.push(kind+' '+n(kept)+' of '+n(all)+share);}
out.textContent='P(match) of at least '+(t/200).toFixed(3)+' keeps '+n(pairs)+' texts: '+parts.join(', ');
document.getElementById('mark').setAttribute('x',44+t/200*508);}
slider.addEventListener('input',show);document.getElementById('needs-script').hidden=false;show();
"""


def render(run: Run, numbers: Numbers, report: dict[str, Any], cards: Cards, options: ReportOptions) -> str:
    """Render the page as HTML, under 5 MB."""
    before = [("Every row and every text, once", _account(report)), ("Where a threshold would cut", _threshold(report))]
    after = [
        ("Properties of the texts", _texts(report)),
        ("Input files, the worst first", _shards(report)),
        ("Rules and errors", _rules(report)),
        ("How this was made", _made(report)),
    ]
    first, last = ("".join(f"<h2>{escape(title)}</h2>{content}" for title, content in part) for part in (before, after))
    examples = _examples(cards, numbers, options, _LIMIT - len(first) - len(last))
    title = f"CapFilt report: {run.where}"
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    histogram = json.dumps(report["histogram"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title>'
        f"<style>{STYLE}{_MORE}</style></head><body><h1>{escape(title)}</h1>{_about(report)}{first}{examples}{last}"
        f'<script type="application/json" id="histogram">{histogram}</script><script>{_SCRIPT}</script></body></html>\n'
    )


def _table(rows: list[tuple], head: tuple[str, ...]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f'<table class="num"><tr>{"".join(f"<th>{escape(h)}</th>" for h in head)}</tr>{cells}</table>'


def _side(*blocks: str) -> str:
    return f'<div class="side">{"".join(blocks)}</div>'


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(_cut(str(value)))


def _cut(text: str, most: int = _LONGEST) -> str:
    text = text.replace("\0", "\ufffd")
    return text if len(text) <= most else text[:most] + "\u2026"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _about(report: dict[str, Any]) -> str:
    kept, texts = sum(report["kept"].values()), sum(report["texts_in"].values())
    line = f"{report['rows']:,} rows gave {texts:,} texts, of which {kept:,} are kept ({_share(kept, texts)})."
    line += f" Selection: {_policy(report['settings'])}."
    warnings = []
    if report["parts"] < report["parts_planned"]:
        warnings.append(f"Only {report['parts']:,} of {report['parts_planned']:,} parts are scored.")
    warnings += [f"{name}: {damage}" for name, damage in list(report["damaged"].items())[:10]]
    shown = "".join(f'<p class="warn">{escape(_cut(w))}</p>' for w in warnings)
    return f"<p>{escape(line)}</p>{shown}"


def _policy(settings: dict[str, Any]) -> str:
    """Format the settings of a selection that its policy uses."""
    used = {"rank-k": ("by", "k"), "fraction": ("by", "fraction")}.get(
        settings["policy"], ("by", "itm", "itm_web", "itm_syn")
    )
    named = {name: settings[name] for name in used if settings[name] is not None}
    named |= {name: settings[name] for name in _DROPS if settings[name]}
    return ", ".join([settings["policy"], *(f"{name} {value}" for name, value in named.items())])


def _account(report: dict[str, Any]) -> str:
    rows = [(f"status {name}", n, _share(n, report["rows"])) for name, n in report["rows_in"].items()]
    rows.append(("rows in", report["rows"], ""))
    texts = []
    for source, n in report["texts_in"].items():
        kept = report["kept"].get(source, 0)
        texts.append((source, n, kept, report["dropped"].get(source, 0), _share(kept, n)))
    texts.append(("all", *(sum(report[k].values()) for k in ("texts_in", "kept", "dropped")), ""))
    reasons = [(reason, n) for reason, n in sorted(report["reasons"].items(), key=lambda one: -one[1])]
    return _side(
        _table(rows, ("rows", "", "share")),
        _table(texts, ("texts", "in", "kept", "dropped", "share kept")),
        _table(reasons, ("reason", "texts")),
    )


def _threshold(report: dict[str, Any]) -> str:
    series = {kind: np.array(counts) for kind, counts in report["histogram"].items()}
    if report["null"]:
        series["shuffled"] = np.array(report["null"]["histogram"])
    rows = []
    for t in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99):
        kept = {kind: int(counts[round(t * BINS) :].sum()) for kind, counts in series.items()}
        rows.append((f"{t:g}", *(f"{n:,} ({_share(n, int(series[kind].sum()))})" for kind, n in kept.items())))
    note = (
        "The grey curve is for captions shuffled among images: the filter's scores of texts that do not match. "
        "It is a lower bound on the noise, not an estimate: near misses score far higher."
        if report["null"]
        else "capfilt calibrate --method null adds the scores of shuffled captions, --method audit estimates precision."
    )
    return (
        '<div id="needs-script" hidden><input id="slider" type="range" min="0" max="200" value="100" '
        'aria-label="threshold"><p id="counts"></p></div>'
        f"{_histogram(series)}<p>{escape(note)}</p>{_table(rows, ('at least', *series))}"
    )


def _histogram(series: dict[str, np.ndarray]) -> str:
    """Draw shares of texts by score, on a square-root scale, so that small bins are visible next to large ones."""
    colours = {"web": "#d97706", "syn": "#2563eb", "shuffled": "#64748b"}
    shares = {kind: np.sqrt(c.reshape(-1)[:BINS].reshape(50, 4).sum(1) / max(1, c.sum())) for kind, c in series.items()}
    top = max((s.max() for s in shares.values()), default=0) or 1
    lines = []
    for kind, share in shares.items():
        points = " ".join(f"{44 + (i + 0.5) / 50 * 508:.1f},{150 - s / top * 140:.1f}" for i, s in enumerate(share))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colours[kind]}" stroke-width="2"/>')
    names = "".join(
        f'<text x="{60 + 110 * i}" y="14" font-size="12" fill="{colours[kind]}">{kind}</text>'
        for i, kind in enumerate(series)
    )
    return (
        '<svg width="560" height="172" role="img" aria-label="scores of web and synthetic texts">'
        '<rect id="mark" x="298" y="8" width="1.5" height="142" fill="#dc2626"/>'
        f'<path d="M44,8V150H552" fill="none" stroke="#cbd5e1"/>{"".join(lines)}{names}'
        '<text x="44" y="166" font-size="11" fill="#475569">P(match) 0</text>'
        '<text x="552" y="166" font-size="11" fill="#475569" text-anchor="end">1</text></svg>'
    )


def _texts(report: dict[str, Any]) -> str:
    names = ("texts", "different", "words_each", "vocabulary", "share_repeated")
    rows = [(kind, *(report["texts"][kind][name] for name in names)) for kind in ("web", "syn")]
    shown = _table([tuple("-" if v is None else v for v in row) for row in rows], ("", "texts", "different",
                   "words each", "vocabulary", "share repeated"))  # fmt: skip
    lists = []
    for kind, title in (("web", "Most common web texts"), ("syn", "Most common synthetic texts")):
        repeated = [(text, n) for text, n in report["repeated"][kind]]
        if repeated:
            lists.append(_table(repeated, (title, "times")))
    return shown + _side(*lists)


def _shards(report: dict[str, Any]) -> str:
    def badness(item: tuple[str, dict]) -> float:
        counts = item[1]
        return -counts["errors"] / counts["rows"] + counts.get("web_kept", 0) / (counts.get("web") or 1)

    worst = sorted(report["shards"].items(), key=badness)[:25]
    rows = [
        (
            name,
            c["rows"],
            _share(c["errors"], c["rows"]),
            _share(c.get("web_kept", 0), c.get("web", 0)),
            _share(c.get("syn_kept", 0), c.get("syn", 0)),
        )
        for name, c in worst
    ]
    more = len(report["shards"]) - len(worst)
    note = f"<p>{more:,} more files are in report.json.</p>" if more else ""
    return _table(rows, ("file", "rows", "errors", "web kept", "synthetic kept")) + note


def _rules(report: dict[str, Any]) -> str:
    codes = _table(list(report["error_codes"].items())[:30], ("error code", "rows")) if report["error_codes"] else ""
    flags = _table(list(report["rule_flags"].items())[:30], ("rule broken", "rows")) if report["rule_flags"] else ""
    return _side(codes, flags) if codes or flags else "<p>None.</p>"


def _made(report: dict[str, Any]) -> str:
    config = "".join(f"<tr><td>{escape(k)}</td><td><code>{escape(_cut(json.dumps(v)))}</code></td></tr>"
                     for k, v in report["config"].items())  # fmt: skip
    facts = "".join(
        f"<tr><td>{escape(k)}</td><td><code>{escape(_cut(v))}</code></td></tr>" for k, v in report["facts"].items()
    )
    speed = ", ".join(f"{report['rows'] / s:,.1f} rows/s on {d}" for d, s in report["seconds"].items() if s)
    return f"<p>{escape(speed)}; openblip {__version__}.</p><table>{config}{facts}</table>"


# Images -------------------------------------------------------------------------------------------------------------


def _examples(cards: Cards, numbers: Numbers, options: ReportOptions, room: int) -> str:
    """Render groups of cards, up to the size limit."""
    shown = ["<h2>Images</h2><p>They were drawn by hash, so that the same run shows the same ones.</p>"]
    if not options.no_blur:
        shown.append('<p><label><input type="checkbox" id="clear"> show images clearly</label></p>')
    for group, members in numbers.examples.items():
        blur = "" if options.no_blur else " blur"
        body = []
        for _, pid, row in members:
            card = cards.card(pid, row)
            room -= len(card)
            if room < 0:
                break
            body.append(card)
        if body:
            shown.append(f'<h3>{escape(group)}</h3><div class="grid{blur}">{"".join(body)}</div>')
    return "".join(shown)


class Cards:
    """Cards of rows; caches the parts it has read as tables, which take a quarter of the memory of Python rows."""

    def __init__(self, run: Run, config: SelectConfig, whole: Whole) -> None:
        self.run, self.config, self.whole = run, config, whole
        self.parts = {part.pid: part for part in run.plan}
        self._texts: dict[str, pa.Table] = {}
        self._notes: dict[str, pa.Table] = {}

    def card(self, pid: str, row: int) -> str:
        note, texts = self._note(pid, row), self._fates(pid)
        body = "".join(_text(text) for text in texts.filter(pc.equal(texts["row"], row)).to_pylist())
        where = f"{note['source_uri']}:{note['source_row']} {note['key']}"
        trouble = f"{note['status']}: {note['error_detail'] or ''}" if note["status"] not in USABLE else ""
        return (
            f'<div class="card">{self.image(pid, row)}{body}'
            f'<div class="no">{escape(_cut(trouble))}</div><div class="from">{escape(_cut(where))}</div></div>'
        )

    def _note(self, pid: str, row: int) -> dict[str, Any]:
        """Return the annotation of a row."""
        if pid not in self._notes:
            self._notes[pid] = self.run.parts.read(pid)
        return self._notes[pid].slice(row, 1).to_pylist()[0]

    def _fates(self, pid: str) -> pa.Table:
        """Return the texts of a part with their fates."""
        if pid not in self._texts:
            account: dict[str, Counter] = defaultdict(Counter)
            self._texts[pid] = select_part(self.run, self.parts[pid], self.config, self.whole, account)
        return self._texts[pid]

    def image(self, pid: str, row: int) -> str:
        """Return a thumbnail of a row's image as an HTML element; empty if there is none."""
        note = self._note(pid, row)
        if note["status"] not in USABLE:
            return ""
        source = self.run.sources[self.parts[pid].source]
        try:
            reader = Reader(source, self.run.reading, self.run.storage)
            stored = next(reader.read(note["source_row"], note["source_row"] + 1))
            image = model_input(
                stored.image or b"", self.run.config.max_pixels, lambda image: small(image, _SIDE), _SIDE
            )
        except Exception:  # whatever a file that was changed meanwhile makes its library raise
            return '<p class="no">the image no longer exists</p>'
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
        inside = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="{escape(_cut(note["key"]))}" src="data:image/jpeg;base64,{inside}">'


def _text(text: dict[str, Any]) -> str:
    fate = "kept" if text["kept"] else "dropped"
    score = "" if text["score"] is None else f" {text['score']:.3f}"
    why = f"{fate}, {text['reason']}"
    return (
        f'<div class="text {fate}"><b>{text["text_source"]}{score}</b> {escape(_cut(text["text"]))}'
        f'<span class="why">{escape(why)}</span></div>'
    )
