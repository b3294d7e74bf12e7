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


def text_notes(tokenizer: Tokenizer, texts: Sequence[str], *, what: str = "") -> list[str]:
    """One line for each text with unknown word pieces, as far as the model reads it.

    ValueError if all word pieces of a text are unknown, or it has no words. `what` the texts are goes before them, such
    as "class ".
    """
    return _notes(tokenizer, texts, [cleaned(text) for text in texts], what)


def question_notes(tokenizer: Tokenizer, question: str) -> list[str]:
    """Describe a question as `text_notes` does texts."""
    return _notes(tokenizer, [question], [clean_question(question)], "the question ")


def check_texts(tokenizer: Tokenizer, texts: Sequence[str], *, what: str = "") -> None:
    """Print `text_notes` on stderr, with the same ValueError."""
    _say(text_notes(tokenizer, texts, what=what))


def check_question(tokenizer: Tokenizer, question: str) -> None:
    """Check a question as `check_texts` does texts."""
    _say(question_notes(tokenizer, question))


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
