"""Embeddings and match scores of image tokens and texts.

    words = embed_texts(model, tokenizer, ["a dog", "a cat"])  # (2, E)
    match_texts(model, tokenizer, [model.vision(pixels)], ["a dog", "a cat"]).probability  # (N, 2)

Image tokens come in parts (B, P, V), the class token first, of as many images as go through the model at once. Texts
are cleaned like captions in training. What is returned is float32, on the model's device, without gradient. ValueError
names a text without words. N images in all parts, M texts, E embedding width, D text width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blip.errors import BadSample
from blip.inference import matching
from blip.models.blip import Matcher
from blip.text import clean_caption
from blip.tokenizer import Tokenizer

MAX_TOKENS = 35
"""Most word pieces of a text that is compared with images (paper, section 5.1)."""
TOGETHER = 256
"""Most texts that go through the model at once."""


class MatchScores(NamedTuple):
    """How well N images and M texts fit each other."""

    itc: Tensor
    """(N, M) cosines of the joint embeddings."""
    logits: Tensor
    """(N, M, 2), of the matching head: no match, match."""

    @property
    def probability(self) -> Tensor:
        """(N, M), probability that the text fits the image."""
        return self.logits.softmax(-1)[..., 1]

    @property
    def score(self) -> Tensor:
        """(N, M), match logit plus cosine: what retrieval ranks by (paper, section 5.1)."""
        return self.logits[..., 1] + self.itc


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Embeddings (N, E) and (M, E) of length 1 -> (N, M) float32; without autocast, which would make ties."""
    with torch.autocast(images.device.type, enabled=False):
        return images.float() @ texts.float().T


@torch.no_grad()
def embed_images(model: Matcher, parts: Iterable[Tensor]) -> Tensor:
    """Image tokens in parts -> joint embeddings (N, E) of length 1 (paper, section 3.2, ITC)."""
    return _joined(model, [model.embed_image(tokens) for tokens in parts])


@torch.no_grad()
def embed_texts(
    model: Matcher, tokenizer: Tokenizer, texts: Sequence[str], *, batch: int = TOGETHER, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """Texts, `batch` at a time -> joint embeddings (M, E) of length 1 (paper, section 3.2, ITC)."""
    embeddings = []
    for start in range(0, len(texts), batch):
        ids, keep = text_ids(model, tokenizer, texts[start : start + batch], "cls", max_tokens)
        device = model.temperature.device
        embeddings.append(model.embed_text(*(grid.to(device, non_blocking=True) for grid in (ids, keep))))
    return _joined(model, embeddings)


@torch.no_grad()
def ground_texts(
    model: Matcher,
    tokenizer: Tokenizer,
    parts: Iterable[Tensor],
    texts: Sequence[str],
    *,
    batch: int = TOGETHER,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """Encode text i over image i, or all texts over a single image -> [ENC] states (M, D), ITM's input."""
    ids, keep = text_ids(model, tokenizer, texts, "enc", max_tokens)
    everything, states, done = torch.arange(len(texts)), [], 0
    parts = iter(parts)
    first = list(itertools.islice(parts, 2))
    is_one = len(first) == 1 and len(first[0]) == 1
    for tokens in itertools.chain(first, parts):
        chosen = [everything] if is_one else everything[done : done + len(tokens), None]
        done += len(tokens)
        if done <= len(texts) or is_one:
            states += matching.ground(model, tokens, ids, keep, list(chosen), batch)
    if not is_one and done != len(texts):
        raise ValueError(f"{done} images and {len(texts)} texts: give as many of both, or one image")
    return torch.cat(states).float()


@torch.no_grad()
def match_texts(
    model: Matcher,
    tokenizer: Tokenizer,
    parts: Iterable[Tensor],
    texts: Sequence[str],
    *,
    batch: int = TOGETHER,
    max_tokens: int = MAX_TOKENS,
) -> MatchScores:
    """Score every image with every text, by ITC and by ITM."""
    words = embed_texts(model, tokenizer, texts, batch=batch, max_tokens=max_tokens)
    ids, keep = text_ids(model, tokenizer, texts, "enc", max_tokens)
    embeds, logits = [], []
    for tokens in parts:
        embeds.append(model.embed_image(tokens))
        chosen = [torch.arange(len(texts))] * len(tokens)
        logits += matching.match(model, tokens, ids, keep, chosen, batch)
    if not logits or not texts:
        raise ValueError(f"nothing to match: {len(logits)} images and {len(texts)} texts")
    return MatchScores(cosines(torch.cat(embeds), words), torch.stack(logits))


def text_ids(
    model: Matcher, tokenizer: Tokenizer, texts: Sequence[str], first: str, max_tokens: int = MAX_TOKENS
) -> tuple[Tensor, Tensor]:
    """Clean texts and encode them -> ids (M, T) and keep (M, T) on the CPU; `first` as in `Tokenizer.encode`."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, not one text")
    longest = min(max_tokens, model.config.text.max_positions)
    return tokenizer.encode([cleaned(text, longest) for text in texts], first=first, max_length=longest)


def cleaned(text: str, max_words: int = MAX_TOKENS) -> str:
    """Clean a text as captions are cleaned in training. ValueError, quoting it, if it has no words."""
    try:
        return clean_caption(text, max_words)
    except BadSample as error:
        raise ValueError(f"text {text!r} cannot be compared with images: {error}") from None


def _joined(model: Matcher, embeddings: list[Tensor]) -> Tensor:
    if embeddings:
        return torch.cat(embeddings)
    return torch.empty(0, model.config.embed_dim, device=model.temperature.device)
