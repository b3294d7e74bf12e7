"""Image-text retrieval: ITC, then ITM re-ranking of the best k (paper, section 5.1). N images, M texts, K candidates.

An image is projected once for all the texts that it is matched with in either direction; its
batch of the gallery goes to one process, so that the answer does not depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip import dist
from blip.data.formats.sources import format_of, shown_config
from blip.data.settings import DataConfig, SourceConfig
from blip.errors import BadSample, DataError
from blip.inference.features import cosines
from blip.inference.matching import match
from blip.models.blip import Blip
from blip.models.protocols import Embeds, Matches, require
from blip.nn import host
from blip.progress import bar
from blip.text import clean_caption
from blip.tokenizer import Tokenizer
from eval.images import Images
from eval.options import RetrievalOptions
from eval.references import ImageId
from eval.runner import Runner, evaluating, in_parts, listed, together

RANKS = (1, 5, 10)
KEPT_BYTES = 1 << 30
"""Most bytes of image tokens kept for the re-ranking; images of a larger gallery are encoded twice."""


def evaluate(options: RetrievalOptions, runner: Runner) -> Iterator[tuple[str, float]]:
    """Evaluate a model; writes results.json, the best texts of each image and the best images of each text."""
    with runner.model() as loaded:
        side = loaded.model.config.vision.image_size
        gallery = Gallery.open(options.source, side, limit=options.limit, batch=options.batch, remote=options.remote)
        ranking = rank(loaded.model, loaded.tokenizer, *gallery, k=options.k, max_tokens=options.max_tokens)
    yield from measured(gallery, ranking, runner, "model", "source", "k")


def measured(
    gallery: Gallery, ranking: Ranking, runner: Runner, *settings: str, name: str = "image_id", kind: str = "images"
) -> Iterator[tuple[str, float]]:
    """In the main process, write the files of a ranking and yield its recalls; `name` and `kind` as in `results`."""
    if not dist.is_main():
        return
    runner.out.write("results.json", results(gallery.ids, gallery.texts, gallery.image_of_text, ranking, name, kind))
    runner.record(*settings, **{kind: len(gallery.ids), "texts": len(gallery.texts)})
    runner.times = 1
    yield from ranking.recalls(torch.as_tensor(gallery.image_of_text)).items()


# Images and texts -----------------------------------------------------------------------------------------------------


class Views:
    """Images as a model sees them, in batches of (B, 3, S, S), or clips; nothing is left out silently."""

    def __init__(
        self, ids: Sequence[ImageId], read: Callable[[Sequence[int]], Iterable[Tensor]], batch: int = 50
    ) -> None:
        """`ids` are the source's names of the images; `read` yields some of them, by number, in batches of `batch`."""
        self.ids, self.read, self.batch = ids, read, batch

    def __iter__(self) -> Iterator[Tensor]:
        return self.share(0, 1)

    def share(self, first: int, step: int) -> Iterator[Tensor]:
        """Batches `first`, `first + step`, ... only; the others are not read."""
        parts = in_parts(range(len(self.ids)), self.batch)
        return iter(self.read([row for part in parts[first::step] for row in part]))


class Gallery(NamedTuple):
    """Held-out images and texts, as `retrieval` takes them."""

    images: Views
    """Images in order; can be iterated any number of times."""
    texts: list[str]
    """Cleaned captions."""
    image_of_text: list[int]
    """Image that each caption belongs to."""

    @classmethod
    def open(
        cls,
        config: SourceConfig,
        image_size: int,
        *,
        limit: int | None = None,
        batch: int = 50,
        threads: int = 2,
        remote: bool = False,
    ) -> Gallery:
        """The first `limit` images of a source that have captions, each once with all of them.

        With `remote`, the source may be behind addresses.

        DataError for one that cannot be used.
        """
        images = Images.open(config, None if format_of(config, remote) == "json" else limit, remote)
        config = shown_config(config)
        images = images.only([entry.id for entry in images.entries if entry.captions][:limit])
        views = Views(
            [entry.id for entry in images.entries],
            lambda rows: (pixels for _, pixels in images.batches(rows, batch, image_size, threads)),
            batch,
        )
        captions = [(f"source {config.path}: image {entry.id}", entry.captions) for entry in images.entries]
        return cls(views, *cleaned(captions, DataConfig.max_words))

    @property
    def ids(self) -> Sequence[ImageId]:
        """Ids of the images in the source."""
        return self.images.ids


def cleaned(captions: Iterable[tuple[str, Sequence[str]]], max_words: int) -> tuple[list[str], list[int]]:
    """Cleaned captions of images or clips, and the number of the one that each belongs to.

    `captions` has the name of each, for the DataError of a caption without words, and its captions.
    """
    texts, owner = [], []
    for number, (name, given) in enumerate(captions):
        for caption in given:
            try:
                texts.append(clean_caption(caption, max_words))
            except BadSample as error:
                raise DataError(f"{name} cannot be evaluated: {error}") from None
            owner.append(number)
    return texts, owner


# Rankings -------------------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """Scores of N images with M texts; a larger one is a better match."""

    cosines: Tensor
    """Cosines (N, M) of the joint embeddings."""
    scores: Tensor
    """Scores (N, M), match logit plus cosine, as in the original; minus infinity for pairs that were not matched."""
    of_image: Tensor
    """Mask (N, M), the texts that were re-ranked for each image."""
    of_text: Tensor
    """Mask (N, M), the images that were re-ranked for each text."""

    def best_texts(self, count: int) -> list[list[int]]:
        """For each image its best texts after re-ranking, best first."""
        return self.scores.masked_fill(~self.of_image, float("-inf")).topk(count, dim=1).indices.tolist()

    def recalls(self, owner: Tensor) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways: `tr@`/`ir@` after re-ranking with their mean, `..._itc` before it."""
        never = float("-inf")
        # Each direction ranks its own k best; what was matched for the other direction does not count.
        after = {
            **recall_of_texts(self.scores.masked_fill(~self.of_image, never), owner),
            **recall_of_images(self.scores.masked_fill(~self.of_text, never), owner),
        }
        before = {**recall_of_texts(self.cosines, owner), **recall_of_images(self.cosines, owner)}
        after["mean_recall"] = sum(after.values()) / len(after)
        return after | {f"{name}_itc": value for name, value in before.items()}


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

    `images` yields normalised images (B, 3, S, S) in order, as often as asked for; `image_of_text` says which of them
    each text belongs to; any number of texts per image, none included. `k` is cut to the size of the gallery; with 0
    nothing is re-ranked, and the cosines are the scores. `batch` is the number of texts that go through the model at
    once.

    All processes have to call it: they share the batches of images and of texts, and each returns the whole. In
    float32 on a CPU the result is the same to the bit for any number of them.
    """
    ways = {"see": model.vision, "embed": lambda tokens: model.embed_image(tokens)}
    ways |= {"k": k, "max_tokens": max_tokens, "batch": batch}
    return compare(model, tokenizer, images, texts, image_of_text, **ways)


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
    require(model, Embeds, Matches)
    owner, device = torch.as_tensor(view_of_text), next(model.parameters()).device

    def embed_text(part: Sequence[str]) -> Tensor:
        ids, keep = tokenizer.encode(part, first="cls", max_length=max_tokens)
        return host.read(model.embed_text(*(grid.to(device, non_blocking=True) for grid in (ids, keep))))[0]

    with evaluating(model):
        seen = _Seen(see, views, device)
        image_embeds = _in_turn(lambda: [host.read(embed(tokens))[0] for tokens in seen])
        count = sum(map(len, image_embeds))
        _check(texts, owner, count)
        mine = in_parts(list(texts), batch)[dist.rank() :: dist.world()]
        text_embeds = _in_turn(lambda: [embed_text(part) for part in mine])
        itc = cosines(torch.cat(image_embeds), torch.cat(text_embeds))
        if k == 0:  # by cosines alone
            return Ranking(itc, itc, torch.ones_like(itc).bool(), torch.ones_like(itc).bool())
        of_image, of_text = candidates(itc, k)
        pairs = of_image | of_text
        encoded = tokenizer.encode(list(texts), first="enc", max_length=max_tokens)
        starts = torch.tensor([0, *map(len, image_embeds)]).cumsum(0).tolist()[dist.rank() :: dist.world()]

        def logits() -> list[Tensor]:
            parts = []
            with bar(count, "re-rank", "images", show=dist.is_main()) as progress:
                for start, tokens in zip(starts, seen, strict=False):
                    chosen = [row.nonzero().squeeze(1) for row in pairs[start : start + len(tokens)]]
                    both = torch.cat(match(model, tokens, *encoded, chosen, batch))
                    parts += host.read(both[:, 1])
                    progress.update(min(len(tokens) * dist.world(), count - progress.n))
            return parts

        scores = torch.full_like(itc, float("-inf"))
        scores[pairs] = torch.cat(_in_turn(logits))  # by image, then by text, as the pairs are
        scores += itc
    return Ranking(itc, scores, of_image, of_text)


class _Seen:
    """Yield this process's image batches as tokens (B, P, V), twice: kept if they fit, else computed again."""

    def __init__(self, see: Callable[[Tensor], Tensor], images: Iterable[Tensor], device: torch.device) -> None:
        self.see, self.images, self.device = see, images, device
        self.kept: list[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if self.kept is not None:
            yield from self.kept
            return
        few: list[Tensor] | None = []
        for images in self._mine():
            tokens = self.see(images.to(self.device, non_blocking=True))
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


def _in_turn(work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Gather each process's results on its batches (rank, rank + processes, ...) as those of all batches, in order."""
    return [one for turn in zip_longest(*together(work)) for one in turn if one is not None]


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
    """Number of wrong candidates before the best right one, per row; a tie counts against us."""
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


# Files ----------------------------------------------------------------------------------------------------------------


def results(
    ids: Sequence[Any],
    texts: Sequence[str],
    owners: Sequence[int],
    ranking: Ranking,
    name: str = "image_id",
    kind: str = "images",
) -> str:
    """Ranking as JSON: for each image its best texts, for each text its best images, up to 10 of each.

    `ids` are those of the images, `owners` says which each text belongs to; `name` and `kind` are what to call them.
    """
    never = float("-inf")
    of_image = ranking.scores.masked_fill(~ranking.of_image, never)
    of_text = ranking.scores.masked_fill(~ranking.of_text, never).T
    there = [{name: id, **_best(row, "texts", range(len(texts)))} for id, row in zip(ids, of_image, strict=True)]
    back = [
        {"text": text, name: ids[owner], **_best(row, kind, ids)}
        for text, owner, row in zip(texts, owners, of_text, strict=True)
    ]
    return f'{{"texts_of_{kind[:-1]}": {listed(there).strip()},\n "{kind}_of_text": {listed(back).strip()}}}\n'


def _best(scores: Tensor, kind: str, names: Sequence[Any]) -> dict[str, Any]:
    best = scores.topk(min(max(RANKS), len(scores)))
    pairs = [(names[i], round(value, 4)) for i, value in zip(*map(Tensor.tolist, best[::-1]), strict=True)]
    pairs = [(name, value) for name, value in pairs if value != float("-inf")]
    return {kind: [name for name, _ in pairs], "scores": [value for _, value in pairs]}
