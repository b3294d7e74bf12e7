"""Answers to questions: the best of given candidates, or generated freely; both with their probability.

Candidates are scored as a tree: a shared prefix is decoded once, all branches of a question go through
the decoder together, and its context is projected once for all of them. R questions, C candidates, K of them scored in
full, N nodes of their tree, L words of the longest candidate, D width, V vocabulary, B images, P image tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from blip.inference.generate import generate_texts
from blip.inference.settings import QUESTION_TOKENS, AnswerConfig
from blip.models.vqa import Vqa
from blip.nn import host
from blip.nn.context import Context
from blip.nn.settings import TextConfig
from blip.nn.stack import Cache

if TYPE_CHECKING:
    from blip.tokenizer import Tokenizer

ANSWERS = "answers.json"
"""File in a model's folder with the answers that it was trained to choose from."""
_SHOWN = 60
"""Characters of a candidate that an error shows."""
_LOGITS = 1 << 25
"""Numbers in a block of logits."""


class Answer(NamedTuple):
    """An answer and its log-probability."""

    text: str
    logprob: float
    """Natural logarithm of the answer's probability under the model, [SEP] included."""

    @property
    def probability(self) -> float:
        """Probability of exactly these words under the model."""
        return math.exp(self.logprob)


class Ranked(NamedTuple):
    """Candidates of each question that were scored in full, best first."""

    index: Tensor
    """(R, K) int64 indices into `Candidates.texts`."""
    scores: Tensor
    """(R, K) float32 scores that order the candidates."""
    logprobs: Tensor
    """(R, K) float32 log-probabilities of the candidates, [SEP] included."""


class Candidates:
    """Answers to choose from, as word pieces, sorted and without duplicates."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        """ValueError if there are no candidates, or one has no words or words unknown to the tokenizer."""
        if not texts:
            raise ValueError("no candidate answers to choose from")
        longest = max(len(text) for text in texts) + 2
        rows: dict[tuple[int, ...], str] = {}
        for text in sorted(set(texts)):
            pieces = tuple(tokenizer.pieces(text, longest)[1:])
            if len(pieces) < 2 or tokenizer.unk_id in pieces:
                why = "has no words" if len(pieces) < 2 else "has words that the tokenizer does not know"
                raise ValueError(f"candidate answer {text[:_SHOWN]!r} {why}")
            rows.setdefault(pieces, text)
        self.texts = list(rows.values())
        """Texts of the candidates; `rank` gives indices into these."""
        self.ids, self.keep = tokenizer.pad(list(rows))  # (C, L), without [DEC], with [SEP]
        self.tree = _Tree(list(rows), self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.texts)

    def check(self, config: TextConfig) -> None:
        """ValueError if a candidate is longer than the decoder can read."""
        if self.ids.shape[1] > config.max_positions:
            text = self.texts[int(self.keep.sum(1).argmax())]
            raise ValueError(
                f"candidate answer {text[:_SHOWN]!r} has {self.ids.shape[1]} word pieces, more than the model's "
                f"{config.max_positions} positions"
            )

    def to(self, device: torch.device) -> Candidates:
        """Move the candidates to the model's device."""
        self.ids, self.keep = self.ids.to(device), self.keep.to(device)
        for name, part in vars(self.tree).items():
            setattr(self.tree, name, part.to(device))
        return self


class _Tree:
    """The distinct beginnings of candidates; one that continues another has a higher number."""

    def __init__(self, rows: Sequence[tuple[int, ...]], longest: int) -> None:
        numbers: dict[tuple[int, ...], int] = {}
        nodes = torch.full((len(rows), longest), -1)
        for i, row in enumerate(rows):
            for depth in range(len(row) - 1):  # [SEP] is predicted and never an input
                nodes[i, depth] = numbers.setdefault(row[: depth + 1], len(numbers))
        self.nodes = nodes
        """(C, L) numbers of each candidate's beginnings, -1 after the last."""
        self.words = torch.tensor([row[-1] for row in numbers])
        """(nodes,) last token of each prefix."""
        self.depth = torch.tensor([len(row) - 1 for row in numbers])
        """(nodes,) number of tokens before the last."""
        self.paths = torch.full((len(numbers), longest), -1)
        """(nodes, L) numbers of the beginnings of each beginning, itself included."""
        for row, number in numbers.items():
            for depth in range(len(row)):
                self.paths[number, depth] = numbers[row[: depth + 1]]


class _Next:
    """Log-probabilities, plain and smoothed, of some next words from logits (R, N, V)."""

    def __init__(self, logits: Tensor, smoothing: float) -> None:
        self.logits, self.smoothing = logits, smoothing
        self.total = logits.logsumexp(-1)
        self.mean = logits.mean(-1) - self.total

    def of(self, at: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Places among N (R, M) and words (R, M) -> log-probabilities and scores (R, M)."""
        rows, _, size = self.logits.shape
        logprobs = self.logits.reshape(rows, -1).gather(1, at * size + words) - self.total.gather(1, at)
        return logprobs, (1 - self.smoothing) * logprobs + self.smoothing * self.mean.gather(1, at)


@torch.no_grad()
def rank(model: Vqa, questions: Context, candidates: Candidates, config: AnswerConfig) -> Ranked:
    """Order the K candidates of each question (R contexts from `Vqa.context`) that begin most likely.

    A candidate's score is the sum over its words, [SEP] included, of their log-probabilities, or with
    `config.smoothing` of the smoothed ones that the training loss is made of. K is `config.k`, or C if there are fewer;
    of candidates with the same first word the alphabetically first are taken. ValueError if the model is in training
    mode or a candidate is too long.
    """
    if model.training:
        raise ValueError("the model is in training mode, which would make its answers random; call model.eval() first")
    candidates.check(model.config.text)
    rows, tree, decoder = len(questions), candidates.tree, model.decoder
    start = torch.full((rows, 1), model.config.text.dec_id, device=candidates.ids.device)
    states = decoder.step(start, start * 0, None, Cache(1), questions)
    opening = _Next(decoder.vocabulary(states).float(), config.smoothing)
    firsts = candidates.ids[:, 0].expand(rows, -1)
    logprobs, score = opening.of(torch.zeros_like(firsts), firsts)
    # Stable, so that ties are broken by order alone.
    chosen = logprobs.sort(dim=1, descending=True, stable=True).indices[:, : config.k]  # (R, K)
    logprobs, score = logprobs.gather(1, chosen), score.gather(1, chosen)

    nodes, words, keep = tree.nodes[chosen], candidates.ids[chosen][..., 1:], candidates.keep[chosen][..., 1:]
    used = torch.zeros(rows, 1 + len(tree.words), dtype=torch.bool, device=chosen.device)
    used = used.scatter(1, 1 + nodes.flatten(1), True)[:, 1:]
    count = int(host.read(used.sum(1).max())[0])
    # Rows that need fewer are filled up with nodes that are not used.
    decoded = used.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]  # (R, N)
    states = _decode_nodes(model, questions, tree, decoded)

    places = torch.zeros_like(used, dtype=torch.int64)
    places.scatter_(1, decoded, torch.arange(count, device=decoded.device).expand_as(decoded))
    at = places.gather(1, nodes[..., :-1].clamp(min=0).flatten(1))
    block = max(1, _LOGITS // (count * model.config.text.vocab_size))
    for i in range(0, rows, block):
        part = slice(i, i + block)
        following = _Next(decoder.vocabulary(states[part]).float(), config.smoothing)
        for total, of_words in zip((logprobs, score), following.of(at[part], words[part].flatten(1)), strict=True):
            total[part] += of_words.view_as(keep[part]).where(keep[part], 0).sum(2)
    score, order = score.sort(dim=1, descending=True, stable=True)
    return Ranked(chosen.gather(1, order), score, logprobs.gather(1, order))


def _decode_nodes(model: Vqa, questions: Context, tree: _Tree, nodes: Tensor) -> Tensor:
    """Decode the `nodes` (R, N) -> states (R, N, D); each sees [DEC], the beginnings of its own, and itself."""
    rows, count = nodes.shape
    depth = tree.depth[nodes]
    above = tree.paths[nodes].gather(2, depth[:, None].expand(-1, count, -1)) == nodes[:, None]
    sees = torch.ones(rows, 1 + count, 1 + count, dtype=torch.bool, device=nodes.device)
    sees[:, 0, 1:] = False
    sees[:, 1:, 1:] = above
    ids = torch.nn.functional.pad(tree.words[nodes], (1, 0), value=model.config.text.dec_id)
    positions = torch.nn.functional.pad(1 + depth, (1, 0))
    return model.decoder.step(ids, positions, sees, Cache(1 + count), questions)[:, 1:]


@torch.no_grad()
def answers(
    model: Vqa,
    tokenizer: Tokenizer,
    questions: Context,
    config: AnswerConfig,
    candidates: Candidates | None = None,
    num: int = 1,
) -> list[list[Answer]]:
    """Find the `num` best answers to each question (R contexts from `encode_questions`), best first.

    They are chosen among candidates, of which there may be fewer; without candidates they come from beam search.
    """
    if candidates is None:
        decode = dataclasses.replace(config.decode(), num=num, beams=max(num, config.beams))
        decoded = generate_texts(model, tokenizer, questions, decode)
        return [[Answer(text.text, text.logprob) for text in texts] for texts in decoded]
    best = rank(model, questions, candidates, config)
    rows = zip(*(part.tolist() for part in host.read(best.index[:, :num], best.logprobs[:, :num])), strict=True)
    return [[Answer(candidates.texts[i], logprob) for i, logprob in zip(*row, strict=True)] for row in rows]


@torch.no_grad()
def encode_questions(
    model: Vqa,
    tokenizer: Tokenizer,
    tokens: Tensor,
    questions: Sequence[str],
    image: Sequence[int],
    max_tokens: int = QUESTION_TOKENS,
) -> Context:
    """Encode R cleaned questions, question i over image `image[i]` of those with tokens (B, P, V)."""
    encoded = tokenizer.encode(questions, first="enc", max_length=max_tokens)
    ids, keep, at = (x.to(tokens.device, non_blocking=True) for x in (*encoded, torch.tensor(image)))
    most = max(Counter(image).values())
    seen = model.question.context(tokens, queries=most * ids.shape[1])
    return model.context(ids, keep, seen[at])
