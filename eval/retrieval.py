"""Image-text retrieval: ITC, then ITM re-ranking of the best k (paper, section 5.1). N images, M texts, K candidates.

Each image is looked at by all the texts it has to be matched with in either direction, so it is projected once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from blip.config import DataConfig, SourceConfig
from blip.data.errors import BadSample, DataError
from blip.data.images import decode
from blip.data.sources import Source, open_source
from blip.data.text import clean_caption
from blip.data.transforms import EvalTransform
from blip.model import Blip, starting_with
from blip.tokenizer import Tokenizer

RANKS = (1, 5, 10)


class Gallery(NamedTuple):
    """Held-out pictures and texts, as `retrieval` takes them."""

    images: Iterable[Tensor]
    """Normalised pictures (B, 3, S, S) in order, as often as asked for."""
    texts: list[str]
    """Cleaned captions."""
    image_of_text: list[int]
    """Which picture each caption belongs to."""

    @classmethod
    def open(
        cls, config: SourceConfig, image_size: int, *, limit: int | None = None, batch: int = 50, workers: int = 0
    ) -> Gallery:
        """The first `limit` rows of a source with all their captions. DataError for a row that cannot be used."""
        source = open_source(config)
        count = len(source) if limit is None else min(limit, len(source))
        pictures = _Pictures(source, count, image_size)
        texts, owner = [], []
        for row in range(count):
            for caption in pictures.record(row).captions:
                texts.append(clean_caption(caption, DataConfig.max_words))
                owner.append(row)
        return cls(DataLoader(pictures, batch, num_workers=workers), texts, owner)


class _Pictures(Dataset):
    """The pictures of a source; nothing is left out silently, so an unreadable one stops the evaluation."""

    def __init__(self, source: Source, count: int, image_size: int) -> None:
        self.source, self.count, self.transform = source, count, EvalTransform(image_size)

    def __len__(self) -> int:
        return self.count

    def record(self, row: int):
        try:
            return self.source[row]
        except BadSample as error:
            raise DataError(f"{self.source.key(row)} cannot be evaluated: {error}") from None

    def __getitem__(self, row: int) -> Tensor:
        record = self.record(row)
        try:
            return self.transform(decode(record.image, DataConfig.max_pixels))
        except BadSample as error:
            raise DataError(f"{record.key} cannot be evaluated: {error}") from None


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


@torch.no_grad()
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
    progress: bool = False,
) -> Ranking:
    """Compare all images with all texts by ITC, and the best `k` of each by ITM too.

    `images` yields normalised pictures (B, 3, S, S) in order, twice; `image_of_text` says which of them each text
    belongs to; any number of texts per image, none included. `k` is cut to the size of the gallery. `batch` is the
    number of texts that go through the model at once.
    """
    owner = torch.as_tensor(image_of_text)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        image_embeds = torch.cat([model.embed_image(model.vision(x.to(device))) for x in images])
        _check(texts, owner, len(image_embeds))
        text_embeds = torch.cat(
            [
                model.embed_text(*(t.to(device) for t in tokenizer.encode(part, first="cls", max_length=max_tokens)))
                for part in _parts(list(texts), batch)
            ]
        )
        cosines = (image_embeds @ text_embeds.T).cpu()
        of_image, of_text = candidates(cosines, k)
        pairs = of_image | of_text
        scores = torch.full_like(cosines, float("-inf"))
        encoded = tokenizer.encode(list(texts), first="enc", max_length=max_tokens)
        bar = tqdm(total=len(cosines), desc="re-rank", unit="image", disable=not progress)
        done = 0
        for x in images:
            context = model.context(model.vision(x.to(device)))
            for row in range(len(x)):
                chosen = pairs[done].nonzero().squeeze(1)
                one = context[torch.tensor([row], device=device)]
                logits = _match(model, one, *encoded, chosen, batch, device)
                scores[done, chosen] = logits + cosines[done, chosen]
                done += 1
            bar.update(len(x))
        bar.close()
    finally:
        model.train(training)
    return Ranking(cosines, scores, of_image, of_text)


def _match(model: Blip, context, ids: Tensor, keep: Tensor, chosen: Tensor, batch: int, device) -> Tensor:
    """Match logits (len(chosen),) of texts `chosen` with the one image of `context`, on the CPU."""
    logits = []
    for part in chosen.split(batch):
        longest = int(keep[part].sum(1).max())
        rows = starting_with(ids[part, :longest], model.config.text.enc_id).to(device)
        found = model.match(rows, keep[part, :longest].to(device), context.expand(len(part)))
        logits.append(found[:, 1].float().cpu())
    return torch.cat(logits) if logits else torch.empty(0)


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
