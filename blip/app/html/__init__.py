"""HTML pages: one file each, which loads nothing and can be read without scripts, on a phone, in light and dark.

A page is a template of `templates/` that extends `page.html`, with one stylesheet. Texts are hostile: Jinja escapes all
that it is given, and the page's own policy (Content-Security-Policy) allows only this stylesheet and these scripts,
by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image

from blip.origin import NOTE, is_synthetic

TEMPLATES = resources.files(__name__) / "templates"
LONGEST = 300
"""Most characters shown of a text."""
_NUMBER = re.compile(r"[+-]?[\d.,]+( ?%| ?s)?( ± .*| \(.*\)| [▲▼])*|-|", re.DOTALL)
_UNSHOWN = re.compile("[\0\ud800-\udfff]")
"""Characters that a page cannot have."""


class Figure(NamedTuple):
    """One of the numbers on top of a page."""

    value: str
    name: str
    note: str = ""


class Line(NamedTuple):
    """A text on a card, and whether it is right (None if unknown)."""

    text: str
    label: str = ""
    right: bool | None = None
    title: str = ""
    """Longer form, shown when pointed at."""

    @property
    def is_number(self) -> bool:
        return bool(self.text and _NUMBER.fullmatch(self.text))


class Card(NamedTuple):
    """An image with texts about it. The first line is the largest."""

    image: str
    """Data URL; empty if there is no image."""
    alt: str
    """Name of the image, never a text about it."""
    lines: Sequence[Line]
    note: str = ""


class Section(NamedTuple):
    """A part of a page of `sections.html`: charts, then images, then a link to another page."""

    heading: str
    intro: str
    charts: Sequence[Markup] = ()
    cards: Sequence[Card] = ()
    link: tuple[str, str] | None = None
    """Words and relative address."""
    is_narrow: bool = False
    """Whether the charts are small ones."""
    first: int = 10
    """Number of cards that are not folded away."""


@dataclass(frozen=True)
class PageTable:
    """A table; numbers are right-aligned, and the first cell of a row is its heading."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""
    """What stands above it."""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column has only numbers."""
        return [
            any(cell not in ("", None) for cell in column) and all(_NUMBER.fullmatch(_cell(cell)) for cell in column)
            for column in zip(*self.rows, strict=True)
        ] or [False] * len(self.head)


def page(template: str, *, title: str, scripts: Sequence[str] = (), allow: Mapping[str, str] | None = None,
         trained_on: Sequence[str] = (), **data: Any) -> str:  # fmt: skip
    """Render a template of `templates/` as a page.

    `title` is what the page found out, in a sentence. `scripts` are files of `templates/`, run at the end of the page.
    `allow` adds to the policy, e.g. {"connect-src": "'self'"} for a page that a server shows. `trained_on`
    are the origins of the model's images, of which the page says so if they are only synthetic. The templates also take
    `kind`, `lead`, `figures` and `alert`; a name that a template lacks raises jinja2.UndefinedError.
    """
    style = _content("style.css")
    code = [Markup(_content(name)) for name in scripts]
    policy = {"default-src": "'none'", "img-src": "data:", "style-src": _hash(style)}
    policy |= {"script-src": " ".join(map(_hash, code))} if code else {}
    policy |= {"base-uri": "'none'", "form-action": "'none'", **(allow or {})}
    defaults = {"kind": "", "lead": "", "figures": (), "alert": ""}
    return _environment().get_template(template).render(
        defaults | data, caution=f"The model was {NOTE}." if is_synthetic(trained_on) else "",
        title=title, style=Markup(style), scripts=code, policy="; ".join(f"{k} {v}" for k, v in policy.items()),
    )  # fmt: skip


def thumbnail(image: Image.Image, side: int = 224, quality: int = 80) -> str:
    """Encode an image as a data URL, resized to a longer side of `side` pixels."""
    buffer = io.BytesIO()
    width, height = (max(1, round(side * length / max(image.size))) for length in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    resized.save(buffer, "JPEG", quality=quality)
    return data_url(buffer.getvalue(), "jpeg")


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def cut(text: str, most: int = LONGEST) -> str:
    """Shorten a text to what a page shows of it."""
    return text if len(text) <= most else text[:most] + "…"


@functools.cache
def _content(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_content), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, finalize=_showable,
    )  # fmt: skip
    environment.filters |= {"cell": _cell, "cut": cut}
    return environment


def _showable(value: Any) -> Any:
    """Replace characters that are no text."""
    return _UNSHOWN.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _cell(value: str | float | None) -> str:
    """Format a cell: counts with separators, other numbers with one decimal."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
