"""Reports as one HTML page: tables, loss curves, and images with the model's texts.

The page is self-contained: images and curves are embedded, and it makes no requests.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blip.files import write_bytes

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
SHOWN, LONGEST = 5, 300
"""Most references shown per image, and most characters shown of a text."""
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1080px;padding:24px;color:#1e293b;background:#fff}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:32px 0 8px}p{margin:4px 0 12px;max-width:760px}
table{border-collapse:collapse}td,th{padding:4px 14px 4px 0;text-align:left;border-bottom:1px solid #e2e8f0}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:16px}
.card{border:1px solid #e2e8f0;border-radius:8px;padding:10px;font-size:13px}
.card img{width:100%;border-radius:4px}.said{font-weight:600;font-size:14px;margin:6px 0}
.yes{color:#047857}.no{color:#b91c1c}ol{margin:4px 0;padding-left:20px}
figure{margin:0;display:inline-block}figcaption{font-size:13px;color:#475569}.curves{display:flex;flex-wrap:wrap;gap:20px}
.line{margin:6px 0 0}.line b{display:block;font-weight:400;color:#64748b;font-size:12px}
"""


@dataclass(frozen=True)
class JudgedText:
    """A text about an image, and whether it is right (None if unknown)."""

    words: str
    right: bool | None = None


@dataclass(frozen=True)
class Card:
    """One image with the model's caption and the texts it ranks first."""

    image: Image.Image
    caption: JudgedText
    retrieved: Sequence[JudgedText]
    reference: str


@dataclass(frozen=True)
class Captioned:
    """A caption with human captions of the same image; `image` is None if it cannot be shown."""

    name: str
    """Name of the image."""
    image: Image.Image | None
    caption: str
    score: float
    references: Sequence[str]


@dataclass(frozen=True)
class Note:
    """One image with labelled texts about it."""

    image: Image.Image
    lines: Sequence[tuple[str, JudgedText]]
    """Pairs of a label and its text."""


def page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Build the page from sections of (heading, introduction, HTML); headings and introductions are plain text."""
    body = "".join(f"<h2>{_safe(heading)}</h2><p>{_safe(intro)}</p>{content}" for heading, intro, content in sections)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="generator" content="openblip"><title>{_safe(title)}</title>'
        f"<style>{STYLE}</style><h1>{_safe(title)}</h1>{body}</html>\n"
    )


def write(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def table(rows: Sequence[Sequence[str | float]], head: Sequence[str]) -> str:
    """Format rows as an HTML table; numbers get one decimal."""
    cells = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_safe(name)}</th>' for name in head)}</tr>{cells}</table>"


def curves(series: dict[str, Sequence[tuple[float, float]]], width: int = 320, height: int = 180) -> str:
    """Plot each named series of (x, y) points as a small SVG, with its extreme values at the axes."""
    plots = (
        _plot(name, list(points), COLOURS[i % len(COLOURS)], width, height)
        for i, (name, points) in enumerate(series.items())
        if len(points) > 1
    )
    return f'<div class="curves">{"".join(plots)}</div>'


def cards(items: Sequence[Card], side: int = 224) -> str:
    return f'<div class="grid">{"".join(_card(item, side) for item in items)}</div>'


def captioned(items: Sequence[Captioned], side: int = 224) -> str:
    """Format images with their captions, scores and up to `SHOWN` references; long texts are cut."""
    return f'<div class="grid">{"".join(_captioned(item, side) for item in items)}</div>'


def notes(items: Sequence[Note], side: int = 224) -> str:
    return f'<div class="grid">{"".join(_note(item, side) for item in items)}</div>'


def intervals(name: str, spans: Sequence[tuple[str, float, float]], width: int = 500) -> str:
    """Plot values with intervals from (label, value, half width); a dashed line marks the first value."""
    if not spans:
        return ""
    low = min(value - half for _, value, half in spans)
    high = max(value + half for _, value, half in spans)
    left, right, line, top = 250, 60, 22, 6
    height = top + line * len(spans) + 4

    def across(value: float) -> float:
        return left + (value - low) / ((high - low) or 1) * (width - left - right)

    first = across(spans[0][1])
    marks = [f'<path d="M{first:.1f},{top}V{height - 4}" stroke="#94a3b8" stroke-dasharray="3 3"/>']
    for i, (label, value, half) in enumerate(spans):
        y, x = top + line * i + line / 2, across(value)
        marks.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end" font-size="12" fill="#1e293b">{_safe(label)}</text>'
            f'<path d="M{across(value - half):.1f},{y}H{across(value + half):.1f}" stroke="{COLOURS[0]}"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{COLOURS[0] if i else COLOURS[-1]}"/>'
            f'<text x="{across(value + half) + 8:.1f}" y="{y + 4}" font-size="12" fill="#475569">{value:.1f}</text>'
        )
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{_safe(name)}">{"".join(marks)}</svg>'
        f"<figcaption>{_safe(name)}</figcaption></figure>"
    )


def _plot(name: str, points: list[tuple[float, float]], colour: str, width: int, height: int) -> str:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high, first, last = min(ys), max(ys), min(xs), max(xs)
    left, right, top, bottom = 44, 8, 8, 22

    def place(x: float, y: float) -> str:
        across = left + (x - first) / ((last - first) or 1) * (width - left - right)
        down = top + (high - y) / ((high - low) or 1) * (height - top - bottom)
        return f"{across:.1f},{down:.1f}"

    line = " ".join(place(x, y) for x, y in points)
    label = 'font-size="11" fill="#475569"'
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{_safe(name)}">'
        f'<path d="M{left},{top}V{height - bottom}H{width - right}" fill="none" stroke="#cbd5e1"/>'
        f'<text x="{left - 4}" y="{top + 10}" text-anchor="end" {label}>{high:.3g}</text>'
        f'<text x="{left - 4}" y="{height - bottom}" text-anchor="end" {label}>{low:.3g}</text>'
        f'<text x="{left}" y="{height - 6}" {label}>{first:g}</text>'
        f'<text x="{width - right}" y="{height - 6}" text-anchor="end" {label}>step {last:g}</text>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/></svg>'
        f"<figcaption>{_safe(name)}: {ys[0]:.3g} to {ys[-1]:.3g}</figcaption></figure>"
    )


def _card(item: Card, side: int) -> str:
    ranked = "".join(f"<li>{_text(text)}</li>" for text in item.retrieved)
    return (
        f'<div class="card"><img alt="{_safe(item.reference)}" src="{_inline(item.image, side)}">'
        f'<div class="said">{_text(item.caption)}</div><ol>{ranked}</ol></div>'
    )


def _captioned(item: Captioned, side: int) -> str:
    image = f'<img alt="{_safe(item.name)}" src="{_inline(item.image, side)}">' if item.image else ""
    written = "".join(f"<li>{_safe(_cut(text))}</li>" for text in item.references[:SHOWN])
    return (
        f'<div class="card">{image}<div class="said">{_safe(_cut(item.caption)) or "(nothing)"}</div>'
        f"<div>{_safe(_cut(item.name))}: {item.score:.1f}</div><ol>{written}</ol></div>"
    )


def _note(item: Note, side: int) -> str:
    lines = "".join(f'<div class="line"><b>{_safe(label)}</b> {_text(text)}</div>' for label, text in item.lines)
    return f'<div class="card"><img alt="" src="{_inline(item.image, side)}">{lines}</div>'


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _text(text: JudgedText) -> str:
    kind, mark = {True: ("yes", " ✓"), False: ("no", " ✗"), None: ("", "")}[text.right]
    return f'<span class="{kind}">{_safe(text.words)}{mark}</span>'


def _inline(image: Image.Image, side: int) -> str:
    """Encode an image, resized to a longer side of `side` pixels, as a data URL."""
    buffer = io.BytesIO()
    width, height = (max(1, round(side * length / max(image.size))) for length in image.size)
    image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cell(value: str | float) -> str:
    return f"<td>{_safe(value)}</td>" if isinstance(value, str) else f'<td class="n">{value:.1f}</td>'


def _safe(text: str) -> str:
    return html.escape(text, quote=True)
