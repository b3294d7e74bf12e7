"""Clean captions and questions for the model: lower case, little punctuation, a limited number of words."""

from __future__ import annotations

import re
import string

from blip.errors import BadSample

LONGEST = 10_000
"""Most characters of a text that are processed: far more than the kept words have."""
_REMOVED = '.!"()*#:;~'
_NO_WORD = _REMOVED + string.whitespace
_TO_SPACE = str.maketrans(_REMOVED, " " * len(_REMOVED))
_TO_NOTHING = str.maketrans("", "", _REMOVED)
_SIDES = re.compile(r"\b(?:left|right)", re.IGNORECASE)


def _limited(text: str) -> str:
    """Cut to LONGEST characters and remove unpaired surrogates, which JSON may hold."""
    text = text if len(text) <= LONGEST else text.lstrip(_NO_WORD)[:LONGEST]
    return text if text.isascii() else text.encode("utf-8", "ignore").decode("utf-8")


def clean_caption(text: str, max_words: int) -> str:
    """Lower-case, replace punctuation by spaces, collapse spaces and keep the first words, within LONGEST characters.

    Raises BadSample when nothing is left. Commas, hyphens and apostrophes stay, as in the original.
    """
    text = _limited(text)
    words = text.lower().translate(_TO_SPACE).split()
    if not words:
        raise BadSample("the caption is empty" if not text.strip() else f"the caption has no words: {text[:40]!r}")
    return " ".join(words[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """Lower-case, remove punctuation without leaving a space, collapse spaces and keep the first words.

    As with captions, at most LONGEST characters are processed.
    """
    return " ".join(_limited(text).lower().translate(_TO_NOTHING).split()[:max_words])


def is_sided(text: str) -> bool:
    """Whether a text mentions left or right, so that mirroring the image would make it wrong."""
    return _SIDES.search(text) is not None
