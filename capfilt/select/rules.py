"""Simple rules that data sets are cleaned with. They annotate; `select --rules PRESET` drops by them.

The figures are those of ALIGN (arXiv 2102.05918), DataComp's basic filter (2304.14108) and LAION-400M (2111.02114).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from blip.text import LONGEST
from capfilt.select.words import count_words

_ADDRESS = re.compile(r"https?://|www\.|\b[\w-]+\.(?:com|org|net|jpg|html?)\b", re.IGNORECASE)
_FILE = re.compile(
    r"^\s*(?:(?:img|dsc|dscn|image|photo|screenshot|p)[_\- ]?\d+|"
    r"[\w\-]+\.(?:jpe?g|png|gif|webp|bmp|avif|hei[cf]|tiff?))\s*$",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"click (?:here|to)|all rights reserved|royalty[- ]free|stock (?:photo|image)|buy now|free shipping|read more|"
    r"sign up|log ?in|no (?:description|caption|image) available|image (?:not found|unavailable)",
    re.IGNORECASE,
)
_MAIL_OR_PHONE = re.compile(r"[\w.+\-]+@[\w\-]+\.\w{2,}|(?:\+?\d[\s().\-]?){9,14}\d")

IMAGE_RULES: dict[str, Callable[[int, int, int, int], bool]] = {
    "min_side<200": lambda width, height, size, frames: min(width, height) < 200,
    "aspect>3": lambda width, height, size, frames: max(width, height) > 3 * min(width, height),
    "bytes<5000": lambda width, height, size, frames: size < 5000,
    "animated": lambda width, height, size, frames: frames > 1,
}
"""Rules on image files: true of (width, height, bytes, frames) where broken."""
TEXT_RULES: dict[str, Callable[[str, int], bool]] = {
    "words<3": lambda text, words: words < 3,
    "words>20": lambda text, words: words > 20,
    "chars<6": lambda text, words: len(text.strip()) < 6,
    "address": lambda text, words: _ADDRESS.search(text) is not None,
    "file_name": lambda text, words: _FILE.match(text) is not None,
    "boilerplate": lambda text, words: _BOILERPLATE.search(text) is not None,
    "personal": lambda text, words: _MAIL_OR_PHONE.search(text) is not None,
}
"""Rules on one web text: true of (text, number of its words) where broken."""
PRESETS: dict[str, frozenset[str]] = {
    "align": frozenset({"min_side<200", "aspect>3", "words<3", "words>20"}),
    "datacomp-basic": frozenset({"min_side<200", "aspect>3", "words<3", "chars<6"}),
    "laion": frozenset({"bytes<5000", "chars<6"}),
    "junk": frozenset({"constant", "address", "file_name", "boilerplate", "personal"}),
}
"""Presets of rules; `align` and `laion` lack the rules that need statistics of the whole crawl."""
_LONGEST = 2000
"""Characters of a text that regular expressions are applied to."""
MOST_TEXTS = 100
"""Most texts of a row that are scored: one row must not cost as much as a thousand others."""


def check_preset(name: str) -> None:
    if name not in PRESETS:
        raise ValueError(f"unknown rules {name!r}: expected one of {', '.join(PRESETS)}")


def image_flags(width: int, height: int, size: int, frames: int) -> list[str]:
    """List the rules that an image file breaks, as `image.RULE`."""
    return [f"image.{name}" for name, broken in IMAGE_RULES.items() if broken(width, height, size, frames)]


def limited(texts: Sequence[str]) -> tuple[list[str], list[str], str | None]:
    """Return a row's texts within the limits, flags for what is cut or left out, and a note on how much."""
    cut = [i for i, text in enumerate(texts[:MOST_TEXTS]) if len(text) > LONGEST]
    flags = [f"row.texts>{MOST_TEXTS}"] * (len(texts) > MOST_TEXTS)
    flags += [f"web{i or ''}.chars>{LONGEST}" for i in cut]
    notes = [f"texts beyond the first {MOST_TEXTS}, left out: {len(texts) - MOST_TEXTS:,}"] * (len(texts) > MOST_TEXTS)
    notes += [f"texts cut at {LONGEST:,} characters: {len(cut):,}"] * bool(cut)
    return [text[:LONGEST] for text in texts[:MOST_TEXTS]], flags, "; ".join(notes) or None


def text_flags(texts: Sequence[str]) -> list[str]:
    """List the rules that each web text breaks, as `web.RULE` for the first text and `web1.RULE` for the second."""
    flags = []
    for i, text in enumerate(texts):
        text = text[:_LONGEST]
        words = count_words(text)
        flags += [f"web{i or ''}.{name}" for name, broken in TEXT_RULES.items() if broken(text, words)]
    return flags


def of_preset(preset: str, flag: str) -> bool:
    """Tell whether a flag, `image.RULE` or `web3.RULE`, is one of a preset's rules."""
    return flag.partition(".")[2] in PRESETS[preset]
