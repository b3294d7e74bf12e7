"""How captions and answers are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from blip.settings import check_fractions, check_positive, require

CAPTION_PROMPT = "a picture of "
"""Beginning of a captioner's texts (paper, section 5.2)."""
LENGTH_RULES = ("generated", "2022")
"""Ways to count the length of a text when beams are compared; see `DecodeConfig`."""
LengthRule = Literal["generated", "2022", 2022]
"""A length rule, or the number 2022, as YAML reads it without quotes; settings turn it into the string."""


def _check_length_rule(settings: Any) -> None:
    rule, rules = str(settings.length_rule), ", ".join(LENGTH_RULES)
    require(rule in LENGTH_RULES, f"length_rule must be one of {rules}, got {settings.length_rule!r}")
    object.__setattr__(settings, "length_rule", rule)


@dataclass(frozen=True)
class DecodeConfig:
    """How a text is decoded. Lengths count tokens: [DEC], the prompt and [SEP] included."""

    method: Literal["beam", "nucleus"] = "beam"
    """Decoding method: `beam` keeps the most likely partial texts (greedy with `beams` 1), `nucleus` samples."""
    beams: int = 3
    """Beginnings kept by beam search."""
    num: int = 1
    """Texts per image: the best of the beams, or independent samples."""
    max_length: int = 20
    """Largest length of a text."""
    min_length: int = 5
    """Smallest length of a text at which [SEP] may be added."""
    length_penalty: float = 1.0
    """Exponent of the length by which a text's summed log-probabilities are divided when texts are compared."""
    length_rule: LengthRule = "generated"
    """Tokens that count as length: `generated` words with [SEP], as in today's transformers; `2022` also the prompt,
    not [SEP], as in that of the original."""
    repetition_penalty: float = 1.0
    """Repetition penalty: above 1 makes words that the text contains already less likely."""
    top_p: float = 0.9
    """Probability mass of nucleus sampling: tokens are drawn from the most likely ones that together reach it."""
    top_k: int = 0
    """Most tokens that nucleus sampling draws from; 0 for any number."""
    temperature: float = 1.0
    """Nucleus: softmax temperature; above 1 evens out, below 1 sharpens."""
    seed: int = 0
    """Nucleus: random seed; a sample is a function of it, its key and its number."""

    def __post_init__(self) -> None:
        for name in ("beams", "num", "max_length", "min_length", "top_k", "seed"):
            value = getattr(self, name)
            require(isinstance(value, Integral), f"{name} must be a whole number, got {value!r}")
        require(self.beams >= 1, f"beams must be 1 or more, got {self.beams}")
        require(self.num >= 1, f"num must be 1 or more, got {self.num}")
        fits = self.method != "beam" or self.num <= self.beams
        require(fits, f"num {self.num} is more than the {self.beams} beams it is chosen from")
        require(self.max_length >= 2, f"max_length must be 2 or more, got {self.max_length}")
        require(self.min_length >= 0, f"min_length must be 0 or more, got {self.min_length}")
        ordered = self.min_length <= self.max_length
        require(ordered, f"min_length {self.min_length} is more than max_length {self.max_length}")
        _check_length_rule(self)
        check_positive(self.repetition_penalty, "repetition_penalty")
        finite = abs(self.length_penalty) < float("inf")
        require(finite, f"length_penalty must be a number, got {self.length_penalty}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be 0 or more, got {self.top_k}")
        check_positive(self.temperature, "temperature")


DECODE_PRESETS: dict[str, DecodeConfig] = {
    "greedy": DecodeConfig(beams=1),
    "caption_2022": DecodeConfig(beams=3, max_length=20, min_length=5, length_rule="2022"),
    "nucleus": DecodeConfig(method="nucleus", top_p=0.9),
    # The paper says nucleus sampling with p 0.9; the release's library and code added the other two.
    "capfilt_2022": DecodeConfig(method="nucleus", top_p=0.9, top_k=50, repetition_penalty=1.1),
}


QUESTION_WORDS, QUESTION_TOKENS = 50, 35
"""Most words and word pieces of a question, as in the original."""


@dataclass(frozen=True)
class AnswerConfig:
    """How a question is answered: by the best of some candidates, or by free generation."""

    k: int = 128
    """Number of candidates scored in full: those with the most likely first tokens."""
    smoothing: float = 0.0
    """Share of a candidate's score that is the mean over all words, as in the training loss (2022: 0.1)."""
    beams: int = 3
    """Number of beams, if there are no candidates."""
    max_length: int = 10
    """Largest length of an answer from beam search; tokens, [DEC] and [SEP] included."""
    length_rule: LengthRule = "generated"
    """Tokens that count as an answer's length in beam search: `generated` words with [SEP]; `2022` [DEC], not [SEP]."""

    def __post_init__(self) -> None:
        require(self.k >= 1, f"k must be 1 or more, got {self.k}")
        check_fractions(self, "smoothing")
        _check_length_rule(self)
        self.decode()

    def decode(self) -> DecodeConfig:
        """The settings of beam search for answers."""
        return DecodeConfig(beams=self.beams, max_length=self.max_length, min_length=0, length_rule=self.length_rule)
