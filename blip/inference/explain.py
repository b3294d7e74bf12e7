"""Cross-attention maps of a match: which image patches are evidence for which words of a text.

The probabilities with which a layer's text tokens attend to image tokens, times the positive part of the match logit's
gradient with respect to them, averaged over heads (as ALBEF's and BLIP's authors show their models). A fused
attention does not return the probabilities, so the context computes them for the layer in question.

T text tokens, P image tokens, G side of the grid of patches, W words, H heads, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from blip.inference.features import MAX_TOKENS, cleaned
from blip.models.blip import Matcher
from blip.nn.context import Context, by_head
from blip.nn.text import TextPass
from blip.tokenizer import Tokenizer

HUE = (232, 93, 4)
"""Colour of evidence: an orange that is as different from grey to those who do not see red or green."""
_MOST = 0.85
"""Opacity of the colour where the evidence is strongest."""


@dataclass(frozen=True)
class Explanation:
    """Evidence in the parts of an image for a text."""

    words: list[str]
    """W words of the text, as cleaned for the model."""
    maps: Tensor
    """(W, G, G) float32, 0 or more: evidence for a match by word and patch, row by row."""
    whole: Tensor
    """(G, G), mean of the evidence over the text's word pieces."""
    probability: float
    """Probability that the text fits the image."""


def explain(
    model: Matcher,
    tokenizer: Tokenizer,
    tokens: Tensor,
    text: str,
    layer: int | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Explanation:
    """Show which patches of an image, with tokens (1, P, V), make the model match a text with it.

    `layer` is the cross-attention to use, from 0 and not the last; 7 of 12 unless given, as shown by the authors.
    ValueError for another layer or a text without words.
    """
    words, pieces = _words(tokenizer, text, min(max_tokens, model.config.text.max_positions))
    ids = torch.tensor([[tokenizer.enc_id, *(i for word in pieces for i in word), tokenizer.sep_id]])
    attended = evidence(model, tokens, ids.to(tokens.device), _layer(model, layer))
    patches = attended.weighted[1:-1, model.vision.vit.num_prefix_tokens :].cpu()  # without [ENC], [SEP], class token
    side = round(patches.shape[1] ** 0.5)
    per_word = torch.stack([part.mean(0) for part in patches.split([len(word) for word in pieces])])
    return Explanation(words, per_word.view(-1, side, side), patches.mean(0).view(side, side), attended.probability)


@dataclass(frozen=True)
class Evidence:
    """One layer's cross-attention and what depends on it, for a text of T tokens over P image tokens."""

    probabilities: Tensor
    """(H, T, P) float32, each row adds up to 1."""
    gradients: Tensor
    """(H, T, P), of the match logit with respect to them."""
    logits: Tensor
    """(2,), no match and match."""

    @property
    def weighted(self) -> Tensor:
        """(T, P), probabilities times positive gradients, mean over heads."""
        return (self.probabilities * self.gradients.clamp(min=0)).mean(0)

    @property
    def probability(self) -> float:
        return self.logits.softmax(0)[1].item()


@dataclass(eq=False, repr=False)
class _Watched(Context):
    """A context that records how one layer attends to it; what comes before that layer gets no gradient."""

    layer: int = 0
    probabilities: Tensor | None = None
    """(1, H, T, P) float32, once the layer has run."""

    def attend_heads(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        if layer != self.layer:
            return super().attend_heads(layer, query, dropout)
        key, value = by_head(self.kv[layer], self.heads).unbind(2)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        self.probabilities = scores.detach().float().softmax(-1).requires_grad_()
        return self.probabilities.to(value.dtype) @ value


def evidence(model: Matcher, tokens: Tensor, ids: Tensor, layer: int) -> Evidence:
    """Image tokens (1, P, V) and a text (1, T) that starts with [ENC], without padding -> how `layer` attends.

    The model has to be in evaluation mode. ValueError for a layer that it does not have.
    """
    layers = len(model.med.blocks)
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be 0 to {layers - 1}, got {layer}")
    with torch.no_grad():
        context = model.context(tokens)
    watched = _Watched(context.kv, context.heads, layer=layer)
    with torch.enable_grad():
        (states,) = model.med([TextPass(ids, torch.ones_like(ids, dtype=torch.bool), context=watched)])
        logits = model.match_head(states[0]).float()
        (gradients,) = torch.autograd.grad(logits[1], watched.probabilities)
    return Evidence(watched.probabilities[0].detach(), gradients[0], logits.detach())


def _layer(model: Matcher, layer: int | None) -> int:
    """Check or choose the layer; not the last, of which only [ENC] is used, so that other words have no effect."""
    last = len(model.med.blocks) - 2
    if layer is None:
        return max(0, min(7 * len(model.med.blocks) // 12, last))
    if not 0 <= layer <= last:
        raise ValueError(f"layer must be 0 to {last}, got {layer}")
    return layer


def _words(tokenizer: Tokenizer, text: str, max_tokens: int) -> tuple[list[str], list[list[int]]]:
    """Split a text into words and the ids of their pieces, without words that do not fit whole."""
    words = cleaned(text, max_tokens).split()
    longest = max_tokens - 2
    pieces = [tokenizer.pieces(word, longest + 2)[1:-1] for word in words]
    fits = sum(sum(map(len, pieces[: i + 1])) <= longest for i in range(len(words)))
    return words[:fits], pieces[:fits]


def overlay(image: Image.Image, heat: Tensor, strongest: float) -> Image.Image:
    """Colour an image in grey by a map (G, G): one hue, clear where there is no evidence, opaque at `strongest`."""
    opacity = (heat / max(strongest, 1e-12)).clamp(0, 1).mul(255 * _MOST).round().to(torch.uint8).numpy()
    mask = Image.fromarray(opacity).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", image.size, HUE), image.convert("L").convert("RGB"), mask)
