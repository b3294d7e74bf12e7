"""Words of a text in any script: most are written with spaces between words, some without.

Chinese, Japanese, Thai, Lao, Khmer and Burmese have no such spaces. Without a dictionary their words are counted by
characters, in a fixed ratio. Korean has spaces and is counted by them.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence

_HAN_AND_KANA = (
    "\u3005\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U000323af"
)
_SOUTH_EAST_ASIAN = (  # Thai, Lao, Khmer, Myanmar, and smaller ones of their kind
    "\u0e01-\u0e46\u0e81-\u0ec6\u0edc-\u0edf\u1000-\u109f\u1780-\u17dc\u1950-\u19df\u1a20-\u1a7f\ua9e0-\ua9ff\uaa60-\uaadf"
)
PER_WORD = ((re.compile(f"[{_HAN_AND_KANA}]"), 2), (re.compile(f"[{_SOUTH_EAST_ASIAN}]"), 3))
"""Scripts without spaces, with the number of letters that count as a word; marks around a letter do not count."""
_LETTERS = f"{_HAN_AND_KANA}{_SOUTH_EAST_ASIAN}"
_UNSPACED = re.compile(f"[{_LETTERS}]")
_PLAIN = re.compile(r"\w+(?:'\w+)*")


def count_words(text: str) -> int:
    """Count the words of a text: between spaces, and in scripts without spaces every `PER_WORD` letters in a row.

    In a mixture, each run of letters, digits or symbols of other scripts is one word more, and punctuation none.
    """
    if text.isascii() or not _UNSPACED.search(text):
        return len(text.split())
    return sum(_count_mixed(word) if _UNSPACED.search(word) else 1 for word in text.split())


def _count_mixed(word: str) -> int:
    return sum(-(-length // per_word) if per_word else 1 for per_word, length in _runs(word))


def _runs(word: str) -> Iterator[tuple[int, int]]:
    """Yield (letters per word, letters) for each run of one script; the first is 0 where spaces separate words."""
    script, length = 0, 0
    for character in word:
        kind = unicodedata.category(character)[0]
        if kind in "MC" or (kind == "P" and not script):  # marks and invisible characters belong to what they follow
            continue
        now = next((n for letters, n in PER_WORD if kind == "L" and letters.match(character)), 0)
        if (now != script or kind == "P") and length:
            yield script, length
            length = 0
        script, length = now, length + (kind != "P")
    if length:
        yield script, length


def words(text: str) -> list[str]:
    """Split a text into its words in lower case; in scripts without spaces every letter, with its marks, is one.

    Punctuation and symbols are left out; an apostrophe inside a word belongs to it, and a hyphen separates two.
    """
    if text.isascii():
        return _PLAIN.findall(text.lower())
    return _words().findall(unicodedata.normalize("NFC", text).lower().replace("\u2019", "'"))


def joined(some: Sequence[str]) -> str:
    """Join words with spaces, except between letters of scripts that have none."""
    text = some[0]
    for before, word in itertools.pairwise(some):
        text += word if _UNSPACED.match(before) and _UNSPACED.match(word) else f" {word}"
    return text


@functools.cache
def _words() -> re.Pattern[str]:
    marks = "".join(c for c in map(chr, range(min(sys.maxunicode, 0x1FFFF))) if unicodedata.category(c)[0] == "M")
    mark, letter = f"[{re.escape(marks)}]", rf"(?=\w)[{_LETTERS}]"
    other = rf"(?:(?!{letter})\w{mark}*)+"  # vowels of Indian scripts are marks
    return re.compile(rf"{letter}{mark}*|{other}(?:'{other})*")
