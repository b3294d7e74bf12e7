"""Parse a text about a scene into its claims, and decide which of them are true.

Captions of the synthetic world are graded by attribute precision (the share of the claims made that is true) and recall
(the share of the possible claims that was made). Words are parsed, not templates, so a model's broken grammar is
understood, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from blip.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, Thing, is_between, relations_of

ATTRIBUTES = ("shape", "colour", "size", "place", "relation", "count", "background")

SHAPE_WORDS = {name: name for name in SHAPES} | {
    "disc": "circle",
    "disk": "circle",
    "crescent": "moon",
    "plus": "cross",
}
SIZE_WORDS = dict.fromkeys(("small", "little", "tiny"), "small") | dict.fromkeys(("large", "big"), "large")
COLOUR_WORDS = {name: name for name in COLOURS}
RELATION_WORDS = {"above": "above", "over": "above", "below": "below", "under": "below", "beneath": "below"}
SIDE_WORDS = {
    **dict.fromkeys(("top", "upper"), "top"),
    **dict.fromkeys(("bottom", "lower"), "bottom"),
    **dict.fromkeys(("middle", "centre", "center", "central"), "middle"),
    "left": "left",
    "right": "right",
}
NUMBER_WORDS = {"one": 1, "single": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
GENERIC_WORDS = ("shape", "thing", "object", "figure", "item")
_PLURALS = {"crosses": "cross"} | {f"{word}s": word for word in (*SHAPE_WORDS, *GENERIC_WORDS)}
_MOST_MENTIONS = 10
"""Most mentions that are matched with things; a text with more is repeating itself."""
_WEIGHTS = {"shape": 2.2, "colour": 2.1, "size": 1.0, "place": 1.1}


@dataclass
class Mention:
    """One thing mentioned in a text; None marks attributes that the text does not give."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    def claims(self) -> Iterator[tuple[str, str]]:
        for name in ("shape", "colour", "size", "place"):
            value = getattr(self, name)
            if value is not None:
                yield name, value


@dataclass
class Relation:
    """A claim that `subject` is `name` (left of, say) `objects`.

    Subject and objects are positions in `Statements.mentions`; "between" has two objects.
    """

    subject: int
    name: str
    objects: list[int] = field(default_factory=list)


@dataclass
class Statements:
    """All claims that a text makes about an image."""

    mentions: list[Mention] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)
    count: int | None = None
    background: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Claims per attribute: how many are true, were made, count towards recall, and could be made of the scene."""

    right: Counter[str]
    claimed: Counter[str]
    recalled: Counter[str]
    possible: Counter[str]

    @property
    def true(self) -> bool:
        """Whether the text makes at least one claim, and no false one."""
        return self.claimed.total() > 0 and self.right == self.claimed

    @property
    def precision(self) -> float:
        """Share of the claims that is true; 1 if there are no claims."""
        return self.right.total() / self.claimed.total() if self.claimed.total() else 1.0

    @property
    def recall(self) -> float:
        """Share of shapes, colours, sizes, places, related pairs, count and background that is claimed correctly.

        A pair of things also counts if both their places are given.
        """
        return self.recalled.total() / self.possible.total()


def parse(text: str) -> Statements:
    """Parse the claims of a text; unknown words are skipped."""
    return _Reader(re.findall(r"[a-z0-9']+|[^\sa-z0-9']", text.lower())).read()


def judge(scene: Scene, text: str) -> Verdict:
    """Compare a text with a scene, matching mentions with things so that most of the text is true."""
    claims = parse(text)
    claimed = Counter(name for mention in claims.mentions for name, _ in mention.claims())
    claimed.update(relation=len(claims.relations))
    pairing = _pairing(scene, claims)
    right: Counter[str] = Counter()
    for mention, thing in zip(claims.mentions, pairing, strict=False):
        right.update(name for name, value in mention.claims() if thing and getattr(thing, name) == value)
    recalled = right.copy()
    true = [relation for relation in claims.relations if _holds(relation, pairing)]
    right["relation"] = len(true)
    pairs = {frozenset((r.subject, other)) for r in true for other in r.objects}
    # The places of two things imply their relation.
    placed = [
        k
        for k, (mention, thing) in enumerate(zip(claims.mentions, pairing, strict=False))
        if thing and mention.place == thing.place
    ]
    pairs |= {frozenset(pair) for pair in combinations(placed, 2)}
    recalled["relation"] = len(pairs)
    for name, value, truth in (
        ("count", claims.count, len(scene.things)),
        ("background", claims.background, scene.background.kind),
    ):
        if value is not None:
            claimed[name] += 1
            right[name] += value == truth
            recalled[name] += value == truth
    n = len(scene.things)
    possible = Counter(shape=n, colour=n, size=n, place=n, relation=n * (n - 1) // 2, count=1, background=1)
    return Verdict(+right, +claimed, +recalled, possible)


def grade(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Attribute precision and recall over many captions, overall and per attribute, and the share of true captions."""
    verdicts = list(verdicts)
    parts = ("right", "claimed", "recalled", "possible")
    sums = {part: sum((getattr(v, part) for v in verdicts), Counter()) for part in parts}
    right, claimed, recalled, possible = (sums[part] for part in parts)
    result = {
        "precision": right.total() / max(claimed.total(), 1),
        "recall": recalled.total() / max(possible.total(), 1),
        "true": sum(v.true for v in verdicts) / max(len(verdicts), 1),
    }
    for name in ATTRIBUTES:
        result[f"precision/{name}"] = right[name] / max(claimed[name], 1)
        result[f"recall/{name}"] = recalled[name] / max(possible[name], 1)
    return result


def _holds(relation: Relation, pairing: list[Thing | None]) -> bool:
    subject, *objects = (pairing[k] if k < len(pairing) else None for k in (relation.subject, *relation.objects))
    if subject is None or None in objects:
        return False
    if relation.name == "between":
        return is_between(subject, *objects)
    return relation.name in relations_of(subject, objects[0])


def _pairing(scene: Scene, claims: Statements) -> list[Thing | None]:
    """The thing that each mention is taken to mean, each thing at most once."""
    mentions = claims.mentions[:_MOST_MENTIONS]
    best: tuple[float, list[Thing | None]] = (-1.0, [])

    def extend(chosen: list[Thing | None], free: list[Thing], score: float) -> None:
        nonlocal best
        if len(chosen) == len(mentions):
            score += sum(1.2 for relation in claims.relations if _holds(relation, chosen))
            best = max(best, (score, chosen), key=lambda pair: pair[0])
            return
        mention = mentions[len(chosen)]
        for thing in free:
            fit = sum(_WEIGHTS[name] for name, value in mention.claims() if getattr(thing, name) == value)
            if fit:
                extend([*chosen, thing], [t for t in free if t is not thing], score + fit)
        extend([*chosen, None], free, score)

    extend([], list(scene.things), 0.0)
    return best[1]


class _Reader:
    """One pass over the words; remembers the adjectives since the last noun and a relation still without its object."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.claims = Statements()
        self.adjectives: dict[str, str] = {}
        self.number: int | None = None
        self.definite = False
        self.last: int | None = None
        self.open: Relation | None = None

    def read(self) -> Statements:
        at = 0
        while at < len(self.words):
            at += self._step(at)
        return self.claims

    def _step(self, at: int) -> int:
        """Consume the word at `at` and perhaps some after it; returns how many."""
        word = self.words[at]
        noun = _PLURALS.get(word, word)
        if word in SIZE_WORDS:
            self.adjectives["size"] = SIZE_WORDS[word]
        elif word in COLOUR_WORDS:
            self.adjectives["colour"] = COLOUR_WORDS[word]
        elif noun in SHAPE_WORDS:
            self._noun(SHAPE_WORDS[noun], plural=word in _PLURALS)
        elif noun in GENERIC_WORDS:
            self._generic(plural=word in _PLURALS)
        elif word in NUMBER_WORDS:
            self._forget()
            self.number = NUMBER_WORDS[word]
        elif word in BACKGROUNDS and self._next(at) in ("background", "backdrop"):
            self.claims.background = word
            return 2
        elif word in RELATION_WORDS:
            self._relate(RELATION_WORDS[word])
        elif word == "between":
            self._relate("between")
        elif word in SIDE_WORDS:
            return self._side(at)
        else:
            self._forget()
            self.definite = word == "the"
        return 1

    def _next(self, at: int, ahead: int = 1) -> str:
        return self.words[at + ahead] if at + ahead < len(self.words) else ""

    def _forget(self) -> None:
        self.adjectives = {}
        self.number = None
        self.definite = False

    def _noun(self, shape: str | None, plural: bool) -> None:
        mention = Mention(shape=shape, **self.adjectives)
        number = self.number if plural and self.number else 1
        known = self._known(mention) if self.definite else None
        self._forget()
        if known is not None:
            for name, value in mention.claims():
                setattr(self.claims.mentions[known], name, value)
            self._mentioned(known)
            return
        for _ in range(number):
            self.claims.mentions.append(replace(mention))
            self._mentioned(len(self.claims.mentions) - 1)

    def _known(self, mention: Mention) -> int | None:
        """The earlier mention that "the ..." refers to."""
        for k in reversed(range(len(self.claims.mentions))):
            earlier = self.claims.mentions[k]
            if earlier.shape == mention.shape and mention.colour in (None, earlier.colour):
                return k
        return None

    def _generic(self, plural: bool) -> None:
        """ "two shapes" is a count, "two red shapes" are mentions without shape, and "shapes" alone claims nothing."""
        if self.adjectives:
            self._noun(None, plural)
        elif self.number is not None and self.claims.count is None:
            self.claims.count = self.number
        self._forget()

    def _mentioned(self, k: int) -> None:
        self.last = k
        if self.open is None:
            return
        self.open.objects.append(k)
        if len(self.open.objects) == (2 if self.open.name == "between" else 1):
            self.claims.relations.append(self.open)
            self.open = None

    def _relate(self, name: str) -> None:
        self._forget()
        self.open = None if self.last is None else Relation(self.last, name)

    def _side(self, at: int) -> int:
        """Side words: a relation in "left of" something, else a place."""
        sides: list[str] = []
        while self._next(at, len(sides)) in SIDE_WORDS:
            sides.append(SIDE_WORDS[self._next(at, len(sides))])
        after = [self._next(at, len(sides) + k) for k in range(3)]
        whole = any(word in ("picture", "image", "photo", "scene", "frame", "drawing") for word in after[1:])
        if after[0] == "of" and sides in (["left"], ["right"]) and not whole:
            self._relate(f"{sides[0]} of")
            return 2
        if after[0] in ("left", "right", *SHAPE_WORDS, *COLOUR_WORDS, *SIZE_WORDS):
            self.adjectives["place"] = _place(sides)
        elif self.last is not None and self.claims.mentions[self.last].place is None:
            self.claims.mentions[self.last].place = _place(sides)
        return len(sides)


def _place(sides: list[str]) -> str:
    """The cell that side words name: "left" is in the middle row, "top middle" is "top"."""
    row = next((side for side in sides if side in ("top", "bottom")), "")
    column = next((side for side in sides if side in ("left", "right")), "")
    name = f"{row} {column}".strip() or "middle"
    assert name in PLACES
    return name
