"""Words that a model's tokenizer does not know, which the model reads as if they were all the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blip.inference.features import cleaned
from blip.text import clean_question
from blip.tokenizer import Tokenizer

_FEW = 5
"""Most texts of which each is named."""
_SHOWN = 60


def refuse_unknown(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """ValueError if all word pieces of a text are unknown, or it has no words; nothing is printed."""
    _notes(tokenizer, texts, [cleaned(text) for text in texts])


def refuse_unknown_question(tokenizer: Tokenizer, question: str) -> None:
    """Refuse a question as `refuse_unknown` does texts."""
    _notes(tokenizer, [question], [clean_question(question)], "the question ")


def check_texts(tokenizer: Tokenizer, texts: Sequence[str], *, what: str = "") -> None:
    """Name on stderr the texts with unknown word pieces, as far as the model reads them.

    ValueError if all word pieces of a text are unknown, or it has no words. `what` the texts are goes before them, such
    as "class ".
    """
    _say(_notes(tokenizer, texts, [cleaned(text) for text in texts], what))


def check_question(tokenizer: Tokenizer, question: str) -> None:
    """Check a question as `check_texts` does texts."""
    _say(_notes(tokenizer, [question], [clean_question(question)], "the question "))


def _notes(tokenizer: Tokenizer, texts: Sequence[str], read: Sequence[str], what: str = "") -> list[str]:
    """Describe the texts with unknown word pieces, which are counted in what is `read` of each. Raises ValueError."""
    lines = []
    for text, words in zip(texts, read, strict=True):
        unknown, total = tokenizer.unknown_pieces(words)
        named = f"{what}{text[:_SHOWN]!r}"
        if unknown == total and total:
            raise ValueError(
                f"all word pieces of {named} are unknown to this model's tokenizer, so it cannot be told from other "
                "texts: use words of the language that the model was trained on"
            )
        if unknown:
            lines.append(f"{unknown} of {total} word pieces of {named} are unknown to this model's tokenizer")
    return lines


def _say(lines: Sequence[str]) -> None:
    for note in lines[:_FEW]:
        print(f"note: {note}", file=sys.stderr)
    if len(lines) > _FEW:
        print(f"note: {len(lines) - _FEW} more texts have unknown word pieces", file=sys.stderr)
