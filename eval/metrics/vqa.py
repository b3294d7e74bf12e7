"""VQA's accuracy: how many of the other annotators gave an answer, after its spelling is evened out, as officially.

The rules are those of the official evaluation (GT-Vision-Lab/VQA, vqaEval.py), its oddities included, because published
numbers depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FEW = 4
"""With fewer answers to a question than this the official measure cannot reach 1; then any of them is right."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official code gives a flag in the place of the count."""
_GROUPED = re.compile(r"\d,\d")
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_COUNTED.split())}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}
"""Words without one of their apostrophes -> with all of them."""
for _none in ("lets", "shes"):
    del _CONTRACTIONS[_none]
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the official list


def normalise(answer: str) -> str:
    """An answer's official spelling: punctuation, articles and capitals out, numbers as digits, apostrophes in."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Marks beside a space are left out, others become one; in a text with 1,000 all are left out."""
    out, grouped = text, _GROUPED.search(text) is not None
    for mark in _PUNCTUATION:
        beside = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if grouped or beside else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def accuracy(answer: str, given: Sequence[str]) -> float:
    """Score of an answer, 0 to 1, by the annotators' answers: the mean of min(1, n / 3), each left out in turn.

    n counts the others that gave this answer. Spelling is evened out only where annotators differ, as officially. With
    fewer than four annotators an answer is right that any of them gave, all being evened out.
    """
    given, answer = [_plain(one) for one in given], _plain(answer)
    if len(set(given)) > 1 or len(given) < FEW:
        given, answer = [normalise(one) for one in given], normalise(answer)
    same = [one == answer for one in given]
    if len(given) < FEW:
        return float(any(same))
    agreeing = sum(same)
    return sum(min(1.0, (agreeing - own) / 3) for own in same) / len(given)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
