"""Features of images and texts: embeddings, grounded states and match scores, from `blip.load(where)`.

    features = blip.load("runs/base/model", device="cuda", dtype=torch.bfloat16)
    features.embed_image(["a.jpg", "b.jpg"]) @ features.embed_text(["a dog", "a cat", "a bird"]).T  # cosines (2, 3)
    features.match(["a.jpg"], ["a dog", "a cat"]).probability  # (1, 2)

N images, M texts, E embedding width, D text width, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from blip.errors import BadSample
from blip.inference import matching
from blip.models import protocols
from blip.models.blip import Matcher
from blip.text import clean_caption
from blip.tokenizer import Tokenizer

ImageInput = str | Path | Image.Image
"""A file's path, or the image itself."""
MAX_TOKENS = 35
"""Most word pieces of a text that is compared with images (paper, section 5.1)."""


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


class Features:
    """A model with its tokenizer, which computes features on the device and in the type of the model's weights.

    Images are a tensor (N, 3, S, S) as blip.data.transforms.EvalTransform makes it, or a list of paths and PIL
    images if there is a function that reads them, as `blip.load` gives. Texts are cleaned like captions in
    training. What is returned is float32, on the model's device, without gradient. DataError names an image that
    cannot be read, ValueError a text without words.
    """

    def __init__(
        self,
        model: Matcher,
        tokenizer: Tokenizer,
        read: Callable[[Sequence[ImageInput], int], Iterator[Sequence[Tensor]]] | None = None,
        *,
        batch: int = 32,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """Put the model in evaluation mode; `batch` images go through it at once.

        `read(images, batch)` yields tensors (3, S, S) of paths and PIL images in order, `batch` at a time, as
        blip.data.image_files.reader(S) does.
        """
        if batch < 1:
            raise ValueError(f"batch must be 1 or more, got {batch}")
        protocols.require(model, protocols.Embeds, protocols.Matches)
        self.model, self.tokenizer, self.batch = model.eval(), tokenizer, batch
        self.max_tokens = min(max_tokens, model.config.text.max_positions)
        self.read = read

    @property
    def image_size(self) -> int:
        """Side of the model's input, pixels."""
        return self.model.config.vision.image_size

    @property
    def device(self) -> torch.device:
        return self.model.temperature.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.temperature.dtype

    @torch.no_grad()
    def embed_image(self, images: Sequence[ImageInput] | Tensor) -> Tensor:
        """Images -> joint embeddings (N, E) of length 1 (paper, section 3.2, ITC)."""
        embeddings = [self.model.embed_image(tokens) for tokens in self.tokens(images)]
        return torch.cat(embeddings) if embeddings else torch.empty(0, self.model.config.embed_dim, device=self.device)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> joint embeddings (M, E) of length 1 (paper, section 3.2, ITC)."""
        embeddings = []
        for start in range(0, len(texts), 8 * self.batch):
            ids, keep = self._tokenize(texts[start : start + 8 * self.batch], "cls")
            embeddings.append(self.model.embed_text(ids.to(self.device), keep.to(self.device)))
        return torch.cat(embeddings) if embeddings else torch.empty(0, self.model.config.embed_dim, device=self.device)

    @torch.no_grad()
    def ground(self, images: Sequence[ImageInput] | Tensor, texts: Sequence[str]) -> Tensor:
        """Encode text i over image i, or all texts over a single image -> [ENC] states (M, D), ITM's input."""
        if len(images) != len(texts) and len(images) != 1:
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give as many of both, or one image")
        ids, keep = self._tokenize(texts, "enc")
        everything = torch.arange(len(texts))
        states, done = [], 0
        for tokens in self.tokens(images):
            chosen = [everything] if len(images) == 1 else everything[done : done + len(tokens), None]
            states += matching.ground(self.model, tokens, ids, keep, list(chosen), 8 * self.batch)
            done += len(tokens)
        return torch.cat(states).float()

    @torch.no_grad()
    def match(self, images: Sequence[ImageInput] | Tensor, texts: Sequence[str]) -> MatchScores:
        """Score every image with every text, by ITC and by ITM."""
        words = self.embed_text(texts)
        ids, keep = self._tokenize(texts, "enc")
        embeds, logits = [], []
        for tokens in self.tokens(images):
            embeds.append(self.model.embed_image(tokens))
            chosen = [torch.arange(len(texts))] * len(tokens)
            logits += matching.match(self.model, tokens, ids, keep, chosen, 8 * self.batch)
        if not logits or not texts:
            raise ValueError(f"nothing to match: {len(images)} images and {len(texts)} texts")
        return MatchScores(cosines(torch.cat(embeds), words), torch.stack(logits))

    def _tokenize(self, texts: Sequence[str], first: str) -> tuple[Tensor, Tensor]:
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, not one text")
        cleaned = []
        for text in texts:
            try:
                cleaned.append(clean_caption(text, self.max_tokens))
            except BadSample as error:
                raise ValueError(f"text {text!r} cannot be compared with images: {error}") from None
        return self.tokenizer.encode(cleaned, first=first, max_length=self.max_tokens)

    @torch.no_grad()
    def tokens(self, images: Sequence[ImageInput] | Tensor) -> Iterator[Tensor]:
        """Image tokens (B, P, V) of `batch` images at a time, the class token first."""
        if isinstance(images, str | Path):
            raise ValueError("images must be a list or a tensor, not one path")
        parts = images.split(self.batch) if isinstance(images, Tensor) else self._decoded(images)
        for part in parts:
            yield self.model.vision(part.to(self.device, self.dtype))

    def _decoded(self, images: Sequence[ImageInput]) -> Iterator[Tensor]:
        if self.read is None:
            raise ValueError("these Features take tensors only: use blip.load, or pass a function `read`")
        return map(torch.stack, self.read(images, self.batch))
