"""Image-text retrieval: ITC, then ITM re-ranking of the best k (paper, section 5.1). N images, M texts, K candidates.

Each image is looked at by all the texts it has to be matched with in either direction, so it is projected once; its
batch of the gallery goes to one process, so that the answer does not depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip import dist
from blip.data.formats.sources import format_of
from blip.data.settings import DataConfig, SourceConfig
from blip.errors import BadSample, DataError
from blip.inference.features import cosines
from blip.inference.matching import match
from blip.models.blip import Blip
from blip.text import clean_caption
from blip.tokenizer import Tokenizer
from blip.train.log import bar
from eval.pictures import Pictures
from eval.references import Id

RANKS = (1, 5, 10)
KEPT_BYTES = 1 << 30
"""So many bytes of image tokens wait for the re-ranking; a larger gallery is looked at twice."""


class Gallery(NamedTuple):
    """Held-out pictures and texts, as `retrieval` takes them."""

    images: Views
    """Normalised pictures (B, 3, S, S) in order, as often as asked for."""
    texts: list[str]
    """Cleaned captions."""
    image_of_text: list[int]
    """Which picture each caption belongs to."""

    @classmethod
    def open(
        cls, config: SourceConfig, image_size: int, *, limit: int | None = None, batch: int = 50, threads: int = 2
    ) -> Gallery:
        """The first `limit` pictures of a source that have captions, each once with all of them.

        DataError for one that cannot be used.
        """
        pictures = Pictures.open(config, None if format_of(config) == "json" else limit)
        pictures = pictures.only([entry.id for entry in pictures.entries if entry.captions][:limit])
        texts, owner = [], []
        for row, entry in enumerate(pictures.entries):
            for caption in entry.captions:
                try:
                    texts.append(clean_caption(caption, DataConfig.max_words))
                except BadSample as error:
                    raise DataError(f"source {config.path}: image {entry.id} cannot be evaluated: {error}") from None
                owner.append(row)
        return cls(Views(pictures, image_size, batch, threads), texts, owner)

    @property
    def ids(self) -> list[Id]:
        """What the source calls each picture."""
        return [entry.id for entry in self.images.pictures.entries]


class Views:
    """Pictures as a model sees them, in batches of (B, 3, S, S); nothing is left out silently."""

    def __init__(self, pictures: Pictures, image_size: int, batch: int = 50, threads: int = 2) -> None:
        self.pictures, self.image_size, self.batch, self.threads = pictures, image_size, batch, threads

    def __iter__(self) -> Iterator[Tensor]:
        return self.share(0, 1)

    def share(self, first: int, step: int) -> Iterator[Tensor]:
        """Batches `first`, `first + step`, ... only; the others are not read."""
        size, rows = self.batch, range(len(self.pictures))
        mine = [row for start in range(first * size, len(rows), step * size) for row in rows[start : start + size]]
        return (images for _, images in self.pictures.batches(mine, size, self.image_size, self.threads))


class Ranking(NamedTuple):
    """Scores of N images with M texts; a larger one is a better match."""

    cosines: Tensor
    """(N, M), of the joint embeddings."""
    scores: Tensor
    """(N, M), match logit plus cosine, as in the original; minus infinity for pairs that were not matched."""
    of_image: Tensor
    """(N, M) bool, the texts that were re-ranked for each image."""
    of_text: Tensor
    """(N, M) bool, the images that were re-ranked for each text."""

    def best_texts(self, count: int) -> list[list[int]]:
        """For each image its best texts after re-ranking, best first."""
        return self.scores.masked_fill(~self.of_image, float("-inf")).topk(count, dim=1).indices.tolist()

    def recalls(self, owner: Tensor) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways: `tr@`/`ir@` after re-ranking with their mean, `..._itc` before it."""
        never = float("-inf")
        # Each direction ranks its own k best; what was matched for the other direction does not count.
        found = {
            **recall_of_texts(self.scores.masked_fill(~self.of_image, never), owner),
            **recall_of_images(self.scores.masked_fill(~self.of_text, never), owner),
        }
        before = {**recall_of_texts(self.cosines, owner), **recall_of_images(self.cosines, owner)}
        found["mean_recall"] = sum(found.values()) / len(found)
        return found | {f"{name}_itc": value for name, value in before.items()}


def retrieval(
    model: Blip,
    tokenizer: Tokenizer,
    images: Iterable[Tensor],
    texts: Sequence[str],
    image_of_text: Sequence[int],
    **options: Any,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent: `tr@`/`ir@` text/image retrieval after re-ranking, `..._itc` before it.

    Takes what `rank` takes. Text retrieval counts an image's best-ranked text, and images without a text are left out.
    """
    ranking = rank(model, tokenizer, images, texts, image_of_text, **options)
    return ranking.recalls(torch.as_tensor(image_of_text))


def rank(
    model: Blip,
    tokenizer: Tokenizer,
    images: Iterable[Tensor],
    texts: Sequence[str],
    image_of_text: Sequence[int],
    *,
    k: int = 128,
    max_tokens: int = 35,
    batch: int = 256,
) -> Ranking:
    """Compare all images with all texts by ITC, and the best `k` of each by ITM too.

    `images` yields normalised pictures (B, 3, S, S) in order, as often as asked for; `image_of_text` says which of them
    each text belongs to; any number of texts per image, none included. `k` is cut to the size of the gallery; with 0
    nothing is re-ranked, and the cosines are the scores. `batch` is the number of texts that go through the model at
    once.

    All processes have to call it: they share the batches of images and of texts, and each returns the whole. In
    float32 on a CPU the result is the same to the bit for any number of them.
    """
    ways = {"k": k, "max_tokens": max_tokens, "batch": batch}
    return compare(model, tokenizer, images, texts, image_of_text, see=model.vision, embed=model.embed_image, **ways)


@torch.no_grad()
def compare(
    model: Blip,
    tokenizer: Tokenizer,
    views: Iterable[Tensor],
    texts: Sequence[str],
    view_of_text: Sequence[int],
    *,
    see: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
    k: int,
    max_tokens: int,
    batch: int,
) -> Ranking:
    """`rank` of whatever `see` turns into tokens (B, P, V) and `embed` those into embeddings (B, E): images, clips."""
    owner = torch.as_tensor(view_of_text)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        seen = _Seen(see, views, device)
        image_embeds = _together(lambda: [embed(tokens).cpu() for tokens in seen])
        count = sum(map(len, image_embeds))
        _check(texts, owner, count)

        def embed_text(part: list[str]) -> Tensor:
            ids, keep = tokenizer.encode(part, first="cls", max_length=max_tokens)
            return model.embed_text(ids.to(device), keep.to(device)).cpu()

        mine = _parts(list(texts), batch)[dist.rank() :: dist.world()]
        text_embeds = _together(lambda: [embed_text(part) for part in mine])
        itc = cosines(torch.cat(image_embeds), torch.cat(text_embeds))
        if k == 0:  # by cosines alone
            return Ranking(itc, itc, torch.ones_like(itc).bool(), torch.ones_like(itc).bool())
        of_image, of_text = candidates(itc, k)
        pairs = of_image | of_text
        encoded = tokenizer.encode(list(texts), first="enc", max_length=max_tokens)
        starts = torch.tensor([0, *map(len, image_embeds)]).cumsum(0).tolist()[dist.rank() :: dist.world()]

        def logits() -> list[Tensor]:
            found = []
            told = bar(count, "re-rank", "images", show=dist.is_main())
            for start, tokens in zip(starts, seen, strict=False):
                chosen = [row.nonzero().squeeze(1) for row in pairs[start : start + len(tokens)]]
                found.append(torch.cat(match(model, tokens, *encoded, chosen, batch))[:, 1].cpu())
                told.update(min(len(tokens) * dist.world(), count - told.n))
            told.close()
            return found

        scores = torch.full_like(itc, float("-inf"))
        scores[pairs] = torch.cat(_together(logits))  # by image, then by text, as the pairs are
        scores += itc
    finally:
        model.train(training)
    return Ranking(itc, scores, of_image, of_text)


class _Seen:
    """This process's batches of images as tokens (B, P, V), twice: kept if they are few, else computed again."""

    def __init__(self, see: Callable[[Tensor], Tensor], images: Iterable[Tensor], device: torch.device) -> None:
        self.see, self.images, self.device = see, images, device
        self.kept: list[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if self.kept is not None:
            yield from self.kept
            return
        few: list[Tensor] | None = []
        for images in self._mine():
            tokens = self.see(images.to(self.device))
            if few is not None:
                few.append(tokens)
                few = few if sum(map(_bytes, few)) <= KEPT_BYTES else None
            yield tokens
        self.kept = few

    def _mine(self) -> Iterator[Tensor]:
        first, step = dist.rank(), dist.world()
        if isinstance(self.images, Views):
            return self.images.share(first, step)
        return islice(self.images, first, None, step)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _together(work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What each process makes of its batches (rank, rank + processes, ...) -> that of all batches, in order.

    What one of them cannot use is raised by all, so that none waits for it.
    """
    made: list[Tensor] = []
    failure = None
    try:
        made = work()
    except (DataError, ValueError) as error:
        failure = error
    parts = dist.gather_objects((made, failure))
    for _, failure in parts:
        if failure:
            raise failure
    return [one for turn in zip_longest(*(part for part, _ in parts)) for one in turn if one is not None]


def candidates(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (N, M) -> bool (N, M) twice: the k best texts of each image, and the k best images of each text."""
    of_image, of_text = torch.zeros_like(cosines, dtype=torch.bool), torch.zeros_like(cosines, dtype=torch.bool)
    of_image.scatter_(1, cosines.topk(min(k, cosines.shape[1]), dim=1).indices, True)
    of_text.scatter_(0, cosines.topk(min(k, cosines.shape[0]), dim=0).indices, True)
    return of_image, of_text


def recall_of_texts(scores: Tensor, owner: Tensor) -> dict[str, float]:
    """Scores (N, M), the owning image of each text (M,) -> `tr@r` in percent over images that have a text."""
    right = owner[None, :] == torch.arange(len(scores))[:, None]
    return _percent("tr", _rank(scores, right)[right.any(1)])


def recall_of_images(scores: Tensor, owner: Tensor) -> dict[str, float]:
    """Scores (N, M), the owning image of each text (M,) -> `ir@r` in percent over texts."""
    right = owner[:, None] == torch.arange(len(scores))[None, :]
    return _percent("ir", _rank(scores.T, right))


def _rank(scores: Tensor, right: Tensor) -> Tensor:
    """Per row, how many wrong ones come before the best right one; a tie counts against us."""
    never = float("-inf")
    best = scores.masked_fill(~right, never).amax(1)
    before = (scores.masked_fill(right, never) >= best[:, None]).sum(1)
    return torch.where(best == never, scores.shape[1], before)


def _percent(name: str, rank: Tensor) -> dict[str, float]:
    return {f"{name}@{r}": 100 * (rank < r).double().mean().item() for r in RANKS}


def _check(texts: Sequence[str], owner: Tensor, images: int) -> None:
    if len(texts) != len(owner):
        raise ValueError(f"{len(texts)} texts but {len(owner)} entries in image_of_text")
    if len(owner) == 0 or images == 0:
        raise ValueError(f"nothing to retrieve: {images} images and {len(owner)} texts")
    if owner.min() < 0 or owner.max() >= images:
        raise ValueError(f"image_of_text names image {int(owner.max())}, but there are {images} (from 0)")


def _parts(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
