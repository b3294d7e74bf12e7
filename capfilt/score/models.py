"""The captioner and the filter: every image is encoded once by each tower, its context projected once.

Two towers with equal weights are one: then the image is seen once by both. B images, N texts of an image, P tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from blip import dist
from blip.checkpoints import checkpoint
from blip.errors import BadSample, is_out_of_memory
from blip.inference.generate import CaptionText, generate_texts
from blip.models.blip import Blip, starting_with
from blip.models.protocols import Embeds, Generates, Matches, require
from blip.nn import host
from blip.nn.context import Context
from blip.nn.pixels import normalise
from blip.origin import print_note, union
from blip.text import clean_caption
from blip.tokenizer import Tokenizer
from capfilt.score.scorer import BatchTooLarge, Item, Matched, Scores, SyntheticText
from capfilt.settings import ScoreConfig, decided, decode_record, decode_settings, resolve

T = TypeVar("T")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONG = 1 << 20
_PER_IMAGE, _FEW = 8, 16
"""Most texts matched at once: per image of a batch, and in any case."""


class BlipScorer:
    """Generates captions with a captioner and matches web and synthetic texts with a filter."""

    def __init__(
        self,
        captioner: tuple[Blip, Tokenizer] | None,
        filter: tuple[Blip, Tokenizer],
        config: ScoreConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        """Move the models to the device and precision, in evaluation mode.

        ValueError if texts may become longer than a model's positions.
        """
        self._device = torch.device(device)
        config = decided(config, device=self._device)
        self._dtype = _DTYPES[config.precision]
        self.config, self.device = config, _name(self._device)
        self.shared = captioner is not None and same_vision(captioner[0], filter[0])
        self.filter, self.tokenizer = self._ready(filter[0]), filter[1]
        self.captioner = self._ready(captioner[0]) if captioner else None
        self.writer = captioner[1] if captioner else None
        self.decode = decode_settings(config)
        require(self.filter, Embeds, Matches)
        if self.captioner is not None:
            require(self.captioner, Generates)
        for model, option, length in (
            (self.captioner, "max_length", self.decode.max_length),
            (self.filter, "max_tokens", config.max_tokens),
        ):
            if model is not None and length > model.config.text.max_positions:
                raise ValueError(
                    f"{option} {length}: the model has {model.config.text.max_positions} positions for text"
                )
        models = [model for model in (self.captioner, self.filter) if model is not None]
        self.sides = tuple(dict.fromkeys(model.vision.image_size for model in models))
        if self.shared:
            self.captioner.vision = self.filter.vision
        self.batch_size = 8 if self._device.type == "cpu" else 256
        self.keeps_embeddings, self.embedding_size = False, self.filter.config.embed_dim
        self._beside = _Beside(self._device) if self._device.type == "cuda" else None
        self._begun: dict[tuple[str, ...], Callable[[], tuple[Tensor, Tensor]]] = {}
        """Images that are being encoded, by the ids of their items."""
        self.facts = {
            "scorer": "blip",
            "decode": json.dumps(decode_record(config)),
            "shared_vision": str(self.shared).lower(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    @classmethod
    def load(cls, config: ScoreConfig, device: str | None = None) -> BlipScorer:
        """Read the models of a configuration; the device is this process's own unless it is numbered.

        FileNotFoundError or ValueError if a model is missing or unsuitable.
        """
        device = str(dist.own_device()) if device in (None, "auto", "cuda") else device
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # what is allocated without a word goes there too
        captioner = None
        if config.captioner:
            captioner = checkpoint.from_pretrained(config.captioner, image_size=config.image_size)
        scorer = cls(captioner, checkpoint.from_pretrained(config.filter, image_size=config.image_size), config, device)
        origins = [checkpoint.trained_on(where) for where in filter(None, (config.captioner, config.filter))]
        for trained_on in origins:
            print_note(trained_on, once=True)
        resolved = resolve(config)
        scorer.facts |= {role: json.dumps(resolved[role]) for role in ("captioner", "filter")}
        scorer.facts["trained_on"] = json.dumps(union(*origins) if all(origins) else [])
        return scorer

    def _ready(self, model: Blip) -> Blip:
        return model.to(self._device, self._dtype).eval().requires_grad_(False)

    def score(self, items: Sequence[Item]) -> list[Scores]:
        """Score items. Raises BatchTooLarge, having freed the memory."""
        return self._fitting(self._score, items)

    def embed(self, items: Sequence[Item]) -> np.ndarray:
        """Return the filter's embeddings of the images alone, (B, E). Raises BatchTooLarge, having freed the memory."""
        return self._fitting(self._embed, items)

    @torch.inference_mode()
    def ahead(self, items: Sequence[Item]) -> None:
        """Launch the encoding of images on a GPU, beside the texts of the batch before, which do not fill it."""
        if self._beside is None:
            return
        while len(self._begun) > 1:  # left by parts that failed
            del self._begun[next(iter(self._begun))]
        try:
            self._begun[_ids(items)] = self._beside.launch(lambda: self._encode(items))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._beside = None

    @torch.inference_mode()
    def _fitting(self, action: Callable[[Sequence[Item]], T], items: Sequence[Item]) -> T:
        try:
            return action(items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        is_crowded = bool(self._begun)
        self._begun.clear()  # outside of the handler nothing of the failed batch is referred to any more
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if is_crowded:  # it may fit alone
            self._beside = None
            return self._fitting(action, items)
        raise BatchTooLarge

    def _embed(self, items: Sequence[Item]) -> np.ndarray:
        embedded = self.filter.embed_image(self.filter.vision(self._images(items, self.filter)))
        return host.read(embedded.float())[0].numpy()

    def _score(self, items: Sequence[Item]) -> list[Scores]:
        begun = self._begun.pop(_ids(items), None)
        tokens, seen = begun() if begun else self._encode(items)
        written = self._caption(items, seen)
        del seen
        texts = [
            [*item.texts, *(_clean(t.text, self.config) for t in captions)]
            for item, captions in zip(items, written, strict=True)
        ]
        embedded = self.filter.embed_image(tokens).float()
        matches = self._match(tokens, texts, embedded)
        kept = host.read(embedded)[0].numpy() if self.keeps_embeddings else [None] * len(items)
        return [
            Scores(
                matched[: len(item.texts)],
                [
                    SyntheticText(t.text, t.logprob, t.finished, m)
                    for t, m in zip(captions, matched[len(item.texts) :], strict=True)
                ],
                embedding,
            )
            for item, captions, matched, embedding in zip(items, written, matches, kept, strict=True)
        ]

    def _encode(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Return the image tokens of filter and captioner, (B, P, D) each; the former twice if there is one tower."""
        images = self._images(items, self.filter)
        tokens = self.filter.vision(images)
        if self.captioner is None or self.shared:
            return tokens, tokens
        if self.captioner.vision.image_size != self.filter.vision.image_size:
            images = self._images(items, self.captioner)
        return tokens, self.captioner.vision(images)

    def _images(self, items: Sequence[Item], model: Blip) -> Tensor:
        """Return images (B, 3, S, S), normalised as by blip.data.transforms.EvalTransform."""
        which = self.sides.index(model.vision.image_size)
        (pixels,) = self._moved(torch.from_numpy(np.stack([item.pixels[which] for item in items])))
        return normalise(pixels.permute(0, 3, 1, 2)).to(self._dtype)

    def _caption(self, items: Sequence[Item], tokens: Tensor) -> list[list[CaptionText]]:
        """Generate `config.captions` texts for each image."""
        if self.captioner is None or self.writer is None:
            return [[] for _ in items]
        keys = [item.sample_id for item in items]
        return generate_texts(
            self.captioner, self.writer, tokens, self.decode, prompt=self.config.prompt.strip(), keys=keys
        )

    def _match(self, tokens: Tensor, texts: Sequence[Sequence[str]], embedded: Tensor) -> list[list[Matched]]:
        """Match all texts of all images: images with equally many together, and never more texts at once than allowed.

        An image with many texts so costs the others nothing.
        """
        images: list[int] = []
        grids: list[tuple[list[int], Tensor, Tensor]] = []
        room = max(_FEW, _PER_IMAGE * len(texts))
        for count in sorted({len(some) for some in texts} - {0}):
            same_count = [i for i, some in enumerate(texts) if len(some) == count]
            for some in _pieces(same_count, max(1, room // count)):
                mine = slice(None) if len(some) == len(texts) else self._moved(torch.tensor(some))[0]
                context = None
                for at in range(0, count, room):
                    grid = [texts[i][at : at + room] for i in some]
                    counts, ids, mask = self._encoded([text for row in grid for text in row])
                    if context is None:
                        context = self.filter.context(tokens[mine], queries=len(grid[0]) * ids.shape[1])
                    images += some
                    grids.append((counts, *self._grid(ids, mask, context, embedded[mine])))
        return self._matched(len(texts), images, grids)

    def _grid(self, ids: Tensor, mask: Tensor, context: Context, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Match N texts (B N, T) of each of B embedded images (B, E) -> margins and cosines (B, N)."""
        per_image = len(ids) // len(embedded)
        logits = self.filter.match(ids, mask, context.expand(per_image)).float()
        margins = (logits[:, 1] - logits[:, 0]).view(-1, per_image)
        texts = self.filter.embed_text(starting_with(ids, self.tokenizer.cls_id), mask).view(
            len(embedded), per_image, -1
        )
        return margins, torch.einsum("bne,be->bn", texts.float(), embedded)

    def _matched(
        self, count: int, images: Sequence[int], grids: Sequence[tuple[list[int], Tensor, Tensor]]
    ) -> list[list[Matched]]:
        """Results of `count` images from grids (word pieces per text, margins, cosines), whose rows are of `images`."""
        matches: list[list[Matched]] = [[] for _ in range(count)]
        if not grids:
            return matches
        # The device is waited for once, when all of its work is under way.
        scores = host.read(*(tensor for _, *both in grids for tensor in both))
        rows, longest = iter(images), self.config.max_tokens
        for (counts, *_), margins, cosines in zip(grids, scores[::2], scores[1::2], strict=True):
            pieces = _pieces(counts, margins.shape[1])
            for row in zip(pieces, margins.tolist(), cosines.tolist(), strict=True):
                matches[next(rows)] += [Matched(m, c, n, n > longest) for n, m, c in zip(*row, strict=True)]
        return matches

    def _moved(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self._device, non_blocking=True) for tensor in tensors]

    def _encoded(self, texts: Sequence[str]) -> tuple[list[int], Tensor, Tensor]:
        """Return the word pieces of each text before truncation, and ids and mask (R, T) as matched."""
        tokenizer, longest = self.tokenizer, self.config.max_tokens
        pieces = [tokenizer.pieces(text, _LONG) for text in texts]
        cut = [p if len(p) <= longest else [*p[: longest - 1], tokenizer.sep_id] for p in pieces]
        ids, mask = self._moved(*tokenizer.pad(cut))
        first = tokenizer.enc_id if self.config.itm_token == "enc" else tokenizer.cls_id
        return [len(p) for p in pieces], starting_with(ids, first), mask


class _Beside:
    """Work on a GPU beside that of its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def launch(self, action: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """Launch an action; returns a function that lets the current stream wait for its tensors, and gives them."""
        current = torch.cuda.current_stream(self._device)
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            tensors = action()
        done = self._stream.record_event()

        def result() -> tuple[Tensor, ...]:
            current.wait_event(done)
            for tensor in tensors:
                tensor.record_stream(current)  # their memory is not used again before this stream is done with them
            return tensors

        return result


def _ids(items: Sequence[Item]) -> tuple[str, ...]:
    return tuple(item.sample_id for item in items)


def same_vision(a: Blip, b: Blip) -> bool:
    """Tell whether two models have the same image encoder, weight for weight."""
    if a.config.vision != b.config.vision:
        return False
    ours, theirs = a.vision.state_dict(), b.vision.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _pieces(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split values into pieces of `size`, in order."""
    return [values[at : at + size] for at in range(0, len(values), size)]


def _clean(text: str, config: ScoreConfig) -> str:
    """Clean a synthetic text as training will; one without words is scored as the empty text."""
    try:
        return clean_caption(text, config.max_words)
    except BadSample:
        return ""


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
