"""Tokenize captions for the metrics: Penn Treebank tokens in lower case, without punctuation.

The reference is Stanford's tokenizer, a Java program. The rules here are for machines without Java, or when it is too
slow. They agree with it on 99.994% of COCO's captions; NLTK's Treebank tokenizer, which treats every text as one
sentence, agrees on 99.772%, takes seven times as long, and would bring four packages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from eval.metrics.java import NoJava, run_java, shipped

Choice = Literal["auto", "java", "python"]
NAMES = {"java": "Stanford PTBTokenizer 3.4.1 (Java)", "python": "eval.ptb (Python)"}

PUNCTUATION = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
                         "...", ";"))  # fmt: skip
"""Tokens that pycocoevalcap removes. Its brackets are upper case and the tokens lower case, so brackets remain."""

_BETWEEN = "A"
"""Line between captions, which begins like most captions."""
_BREAKS = re.compile("[\r\n\v\f\x85\u2028\u2029\0]+")
"""Characters that end a line, or the input, for Stanford's tokenizer."""
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''"}
_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d", '"'),
        **dict.fromkeys("\u2018\u2019", "'"),
        **dict.fromkeys("\u2013\u2014", " -- "),
        **dict.fromkeys("\u200b\ufeff", " "),
        **{"…": "...", "½": "1/2", "¼": "1/4", "¾": "3/4"},
    }
)
"""Curly quotes, dashes, spaces of no width, and what else is written out."""
_UNKNOWN = re.compile("[\U00010000-\U0010ffff]")
"""Emoji and the like, which Stanford's tokenizer of 2014 drops."""
_LETTER, _WORD = r"[^\W\d_]", "[\\w\u0300-\u036f]"
_TOKEN = re.compile(
    rf"""
      </?[a-z][^<>]*>                                     # a tag
    | \d+[ ]\d+/\d+ | \d+(?:[./,:-]\d+)+                  # 2 1/2, 1,000, 8:30
    | \b(?:{_LETTER}\.){{2,}}(?:{_LETTER}\b)?             # t.v., u.s.a
    | \b{_LETTER}\.(?:{_LETTER}\b|(?!\s*$))               # t.v, w. 2nd street
    | \b(?:mr|mrs|ms|dr|prof|st|ave|blvd|rd|mt|jr|sr|vs|etc|inc|co|corp|ltd|ft|ct|ky|penn)\.
    | '(?:s|m|d|re|ve|ll)(?!\w) | \w+?(?=n't\b) | n't\b   # it 's, do n't
    | can(?=not\b) | (?:gon|wan|got)(?=(?:na|ta)\b) | (?:gim|lem)(?=me\b) | 't(?=is\b|was\b)
    | (?-i:[A-Z]+&[A-Z]+s?) | [\#@]{_LETTER}\w*           # AT&T, #name
    | '\d\ds?\b                                           # '90s
    | dunkin' | \b[odl]'(?={_LETTER}{{2}})\w+             # o'clock, d'oeuvre
    | {_WORD}+(?:-{_WORD}+|[/.](?={_LETTER}){_WORD}+|(?<=[aeiouy])'(?=[aeiou]){_WORD}+)*  # clock-tower, his/her
    | \.{{3,}} | --+ | `` | '' | [?!]{{2,}} | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


class Tokens(NamedTuple):
    """Captions as tokens with single spaces between them."""

    texts: list[str]
    tokenizer: str
    """Tokenizer that was used, a value of NAMES."""
    fallback: str
    """Reason why Java was tried and not used; else empty."""


def tokenize(captions: Sequence[str], choice: Choice = "auto", seconds: float = 300.0) -> Tokens:
    """Tokens of captions, each independent of the others, whatever is in them.

    `auto` asks Java and, when it does not answer in `seconds`, falls back on the rules here. NoJava, with the
    reason, when `choice` is `java` and it does not.
    """
    cleaned = [clean(caption) for caption in captions]
    fallback = ""
    if choice != "python":
        try:
            return Tokens(_by_java(cleaned, seconds), NAMES["java"], "")
        except NoJava as error:
            if choice == "java":
                raise NoJava(f"tokenizer java: {error}; take python, or auto") from None
            fallback = str(error)
    return Tokens([_joined(_split(caption)) for caption in cleaned], NAMES["python"], fallback)


def clean(caption: str) -> str:
    """A caption as one line, without half surrogates."""
    if not caption.isascii():
        caption = caption.encode("utf-8", "ignore").decode()
    return _BREAKS.sub(" ", caption)


def _by_java(captions: Sequence[str], seconds: float) -> list[str]:
    if not captions:
        return []
    # Whether "a sign that says K." ends in "k." or "k" depends on the next line, so each is followed by the same one.
    content = "".join(f"{caption}\n{_BETWEEN}\n" for caption in captions).encode()
    jar = shipped("tokenizer", "stanford-corenlp-3.4.1.jar")
    program = ("-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer")
    options = ("-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    output = run_java((*program, *options, "captions.txt"), seconds, {"captions.txt": content})
    lines = [line.rstrip() for line in output.split("\n")]
    if len(lines) != 2 * len(captions) + 1 or set(lines[1::2]) != {_BETWEEN.lower()}:
        raise NoJava(f"the tokenizer answered {len(lines) - 1} lines for {2 * len(captions)}, or others' lines")
    return [_joined(line.split(" ")) for line in lines[:-1:2]]


def _split(caption: str) -> list[str]:
    if not caption.isascii():
        caption = _UNKNOWN.sub(" ", caption.translate(_PLAIN))
    # Stanford's keeps a number and its fraction together with a hard space.
    return [_BRACKETS.get(token, token).replace(" ", "\u00a0").lower() for token in _TOKEN.findall(caption)]


def _joined(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in PUNCTUATION)
