"""A model with all that it can do: what `blip.load` returns, and what every sub-command uses.

    model = blip.load("runs/demo/captioner/model")
    model.caption("photo.jpg")  # "two dogs on a beach"
    model.caption(["a.jpg", "b.jpg"], num=3)  # three captions of each

N images, M texts, E embedding width, S image side in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from blip.app.candidates import load_candidates
from blip.app.commands.shared import MODEL_VARIABLE
from blip.checkpoints import checkpoint
from blip.data.inputs import ImageInput, Images, InputImage, InputReader, is_one
from blip.data.transforms import EvalTransform
from blip.errors import is_out_of_memory
from blip.inference import explain, features, zero_shot
from blip.inference.answering import Answer, Candidates, answers, encode_questions
from blip.inference.explain import Explanation
from blip.inference.features import MatchScores
from blip.inference.generate import CaptionText, generate_texts
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS, AnswerConfig, DecodeConfig
from blip.models.blip import Blip, Captioner, Matcher
from blip.models.dialogue import Dialogue
from blip.models.nlvr import Nlvr
from blip.models.vqa import Vqa
from blip.origin import print_note
from blip.tensors import add_to_digest
from blip.text import clean_question
from blip.tokenizer import Tokenizer

T = TypeVar("T")
_MATCHING = ("embed_image", "embed_text", "similarity", "ground", "match", "classify", "explain")
_KINDS: dict[type, tuple[str, tuple[str, ...]]] = {
    Blip: ("a captioning and matching model", ("caption", *_MATCHING)),
    Captioner: ("a captioning model", ("caption",)),
    Matcher: ("a matching model", _MATCHING),
    Vqa: ("a question-answering model", ("answer",)),
    Nlvr: ("a model for sentences about several images", ()),
    Dialogue: ("a dialogue model", ()),
}
"""Class of a model -> its description, and the methods of `Loaded` that it has the parts for."""
_WANTED = {
    "caption": ("caption", "caption"),
    "answer": ("answer questions", "vqa"),
    "embed_image": ("embed images", "retrieval"),
    "embed_text": ("embed texts", "retrieval"),
    "similarity": ("compare texts with images", "retrieval"),
    "ground": ("compare texts with images", "retrieval"),
    "match": ("match texts with images", "retrieval"),
    "classify": ("classify images", "retrieval"),
    "explain": ("explain a match", "retrieval"),
}
"""Method of `Loaded` -> its description, and the recipe that trains a model for it."""


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """A model with its tokenizer, image transform, device and precision.

    An image is a path, the bytes of a file, a PIL image, a uint8 array (H, W) or (H, W, 3 or 4), or an undecoded row of
    `datasets`; several are a sequence or column of these, or a tensor (N, 3, S, S) as `transform` makes it. One image
    gives one result, several give a list in their order; tensors always have N first, and are float32, on the model's
    device, without gradient. In float32 a result depends on its own image and text alone, not on the others or their
    order. DataError names an image that cannot be read, ValueError what the model cannot do.
    """

    model: Any
    """The network, in evaluation mode."""
    tokenizer: Tokenizer
    transform: EvalTransform
    """Function from a PIL image in RGB to the model's input (3, S, S)."""
    device: torch.device
    precision: torch.dtype = torch.float32
    """Type that the model computes in where autocast allows it; float32 is the type of its weights."""
    batch: int = 16
    """Number of images that go through the model at once."""
    urls: bool = False
    """Whether images may be given as http(s) addresses, which are then downloaded."""
    trained_on: tuple[str, ...] = ()
    """Names of what the model was trained on, as far as its folder says."""
    path: Path | None = None
    """Folder of the model's files, or the one file."""

    def __post_init__(self) -> None:
        _check_count("batch", self.batch)

    def __repr__(self) -> str:
        kind, verbs = _KINDS[type(self.model)]
        return f"<{kind} of {self.path}, on {self.device}: {', '.join(verbs) or 'no methods'}>"

    @property
    def can(self) -> frozenset[str]:
        """Names of the methods that this model has the parts for, such as `caption`."""
        return frozenset(_KINDS[type(self.model)][1])

    @property
    def image_size(self) -> int:
        """Side of the model's input, pixels."""
        return self.transform.image_size

    # Texts about images ---------------------------------------------------------------------------------------------

    @overload
    def caption(
        self, images: ImageInput, *, num: None = None, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> str: ...  # fmt: skip
    @overload
    def caption(
        self, images: ImageInput, *, num: int, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> list[str]: ...  # fmt: skip
    @overload
    def caption(
        self, images: Images, *, num: None = None, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> list[str]: ...  # fmt: skip
    @overload
    def caption(
        self, images: Images, *, num: int, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def caption(
        self, images: ImageInput, *, num: None = None, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[True], errors: Literal["raise"] = "raise",
    ) -> CaptionText: ...  # fmt: skip
    @overload
    def caption(
        self, images: ImageInput, *, num: int, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[True], errors: Literal["raise"] = "raise",
    ) -> list[CaptionText]: ...  # fmt: skip
    @overload
    def caption(
        self, images: Images, *, num: None = None, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[True], errors: Literal["raise"] = "raise",
    ) -> list[CaptionText]: ...  # fmt: skip
    @overload
    def caption(
        self, images: Images, *, num: int, prompt: str = ..., decode: DecodeConfig | str | None = ...,
        seed: int = ..., details: Literal[True], errors: Literal["raise"] = "raise",
    ) -> list[list[CaptionText]]: ...  # fmt: skip
    @overload
    def caption(
        self, images: ImageInput | Images, *, num: int | None = ..., prompt: str = ...,
        decode: DecodeConfig | str | None = ..., seed: int = ..., details: bool = ...,
        errors: Literal["raise", "none"] = ...,
    ) -> Any: ...  # fmt: skip
    def caption(
        self,
        images,
        *,
        num=None,
        prompt=CAPTION_PROMPT,
        decode=None,
        seed=0,
        details=False,
        errors="raise",
    ):
        """Caption an image, or several: a `str` each, or with `num` a list of so many, the likeliest first.

        Captions continue `prompt`, which is not part of them; "" for a model trained without a prompt, as by
        pre-training alone. `decode` is a DecodeConfig or the name of one of DECODE_PRESETS ("nucleus" samples), by
        default the paper's beam search; its `num` and `seed` are replaced by the arguments. Samples are a function of
        `seed` and the bytes of the file; those of a PIL image or an array depend on its pixels, and differ from its
        file's. `details` gives CaptionText, with log-probability and whether the caption ended by itself. With `errors`
        "none" an image that cannot be read gives None.
        """
        self.require("caption")
        config = _decoding(decode, num, seed)
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a text, got {reprlib.repr(prompt)}")
        if self.tokenizer.unknown_rate([prompt]):
            raise ValueError(f'prompt {prompt!r} has words that the model\'s tokenizer does not know: give prompt=""')

        def work(pixels: Tensor, batch: list[InputImage], _: list[None]) -> list[list[CaptionText]]:
            keys = [image.key for image in batch]
            return generate_texts(self.model, self.tokenizer, pixels, config, prompt=prompt, keys=keys)

        captions = self._of_each(images, work, errors, keyed=config.method == "nucleus")
        shaped = [texts and _shaped(texts, num, details) for texts in captions]
        return shaped[0] if is_one(images) else shaped

    @overload
    def answer(
        self, images: ImageInput, questions: str, *, top: None = None, candidates: Any = ..., method: Any = ...,
        details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> str: ...  # fmt: skip
    @overload
    def answer(
        self, images: ImageInput, questions: str, *, top: int, candidates: Any = ..., method: Any = ...,
        details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> list[str]: ...  # fmt: skip
    @overload
    def answer(
        self, images: ImageInput | Images, questions: str | Sequence[str], *, top: None = None, candidates: Any = ...,
        method: Any = ..., details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> list[str]: ...  # fmt: skip
    @overload
    def answer(
        self, images: ImageInput | Images, questions: str | Sequence[str], *, top: int, candidates: Any = ...,
        method: Any = ..., details: Literal[False] = False, errors: Literal["raise"] = "raise",
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def answer(
        self, images: ImageInput, questions: str, *, top: None = None, candidates: Any = ..., method: Any = ...,
        details: Literal[True], errors: Literal["raise"] = "raise",
    ) -> Answer: ...  # fmt: skip
    @overload
    def answer(
        self, images: ImageInput | Images, questions: str | Sequence[str], *, top: int | None = ...,
        candidates: Any = ..., method: Any = ..., details: bool = ..., errors: Literal["raise", "none"] = ...,
    ) -> Any: ...  # fmt: skip
    def answer(
        self,
        images,
        questions,
        *,
        top=None,
        candidates=None,
        method="auto",
        details=False,
        errors="raise",
    ):
        """Answer a question about an image, many about one image, one about many images, or one about each of many.

        One image with one question gives a `str`, or with `top` a list of so many, best first; otherwise there is a
        list of these. Answers are chosen from `candidates`, a list or a file of them, by default the model's own, or
        generated freely if there are none; `method` "rank" or "generate" requires one of the two. `details` gives
        Answer, with the probability of exactly these words. With `errors` "none" an image that cannot be read gives
        None.
        """
        self.require("answer")
        one_image, one_question = is_one(images), isinstance(questions, str)
        cleaned = [_cleaned_question(question) for question in _listed(questions)]
        if not one_image and not hasattr(images, "__len__"):
            images = list(images)
        count = 1 if one_image else len(images)
        if len(cleaned) != count and len(cleaned) != 1 and count != 1:
            raise ValueError(
                f"{count} images and {len(cleaned)} questions: give as many of both, or one image, or one question"
            )
        _check_count("top", top)
        choices = self.candidates(candidates, method)
        most = 1 if top is None else top

        def work(pixels: Tensor, _: list[InputImage], of_images: list[list[str]]) -> list[list[list[Answer]]]:
            tokens, results = self.model.vision(pixels), []
            pairs = [(number, question) for number, several in enumerate(of_images) for question in several]
            for start in range(0, len(pairs), self.batch):
                numbers, texts = zip(*pairs[start : start + self.batch], strict=True)
                context = encode_questions(self.model, self.tokenizer, tokens, texts, numbers)
                results += answers(self.model, self.tokenizer, context, AnswerConfig(), choices, most)
            rest = iter(results)
            return [list(itertools.islice(rest, len(several))) for several in of_images]

        each = [cleaned] if count == 1 else [[question] for question in cleaned]
        beside = itertools.repeat(each[0]) if len(each) == 1 else each
        answered = self._of_each(images, work, errors, beside=beside)
        shaped: list[Any] = []
        for several, texts in zip(answered, beside, strict=False):
            shaped += [None] * len(texts) if several is None else [_shaped(best, top, details) for best in several]
        return shaped[0] if one_image and one_question else shaped

    def candidates(
        self,
        given: Candidates | Sequence[str] | str | Path | None = None,
        method: Literal["auto", "rank", "generate"] = "auto",
    ) -> Candidates | None:
        """The answers that `answer` chooses from, on the model's device; None if it generates freely."""
        if given is None and method != "generate":
            return self._own_candidates if method == "auto" else self._ranked(None, method)
        return self._ranked(given, method)

    @functools.cached_property
    def _own_candidates(self) -> Candidates | None:
        return self._ranked(None, "auto")

    def _ranked(self, given: Any, method: str) -> Candidates | None:
        chosen = given
        if not isinstance(given, Candidates):
            chosen = load_candidates(given, self.path, method, self.tokenizer)
        if chosen is not None:
            chosen.check(self.model.config.text)
            chosen.to(self.device)
        return chosen

    # Images and texts compared --------------------------------------------------------------------------------------

    def embed_image(self, images: ImageInput | Images) -> Tensor:
        """Images -> joint embeddings (N, E) of length 1 (paper, section 3.2, ITC)."""
        self.require("embed_image")
        with self.computing():
            return features.embed_images(self.model, self.tokens(images))

    def embed_text(self, texts: str | Sequence[str]) -> Tensor:
        """Texts, cleaned like captions in training -> joint embeddings (M, E) of length 1."""
        self.require("embed_text")
        with self.computing():
            return features.embed_texts(self.model, self.tokenizer, _listed(texts), batch=8 * self.batch)

    def similarity(self, images: ImageInput | Images, texts: str | Sequence[str]) -> Tensor:
        """Cosines (N, M) of the embeddings of images and texts: the fast score, by ITC."""
        self.require("similarity")
        return features.cosines(self.embed_image(images), self.embed_text(texts))

    def match(self, images: ImageInput | Images, texts: str | Sequence[str]) -> MatchScores:
        """Score every image with every text: `itc`, `probability` and `score`, each (N, M), and `logits` (N, M, 2)."""
        self.require("match")
        with self.computing():
            parts = self.tokens(images)
            return features.match_texts(self.model, self.tokenizer, parts, _listed(texts), batch=8 * self.batch)

    def ground(self, images: ImageInput | Images, texts: str | Sequence[str]) -> Tensor:
        """Encode text i over image i, or all texts over a single image -> states of [ENC] (M, D), multimodal features.

        D text width. ValueError for other counts.
        """
        self.require("ground")
        with self.computing():
            parts = self.tokens(images)
            return features.ground_texts(self.model, self.tokenizer, parts, _listed(texts), batch=8 * self.batch)

    @overload
    def classify(
        self, images: ImageInput, classes: Sequence[str], *, templates: Sequence[str] = ..., top: int | None = ...
    ) -> list[tuple[str, float]]: ...
    @overload
    def classify(
        self, images: Images, classes: Sequence[str], *, templates: Sequence[str] = ..., top: int | None = ...
    ) -> list[list[tuple[str, float]]]: ...
    def classify(self, images, classes, *, templates=zero_shot.TEMPLATES, top=None):
        """Classify images without training: (class, probability) of the `top` classes, or of all, best first.

        A class is the mean of its name in the `templates`, each with one `{}`. The probabilities of all classes add up
        to 1 even if an image shows none of them.
        """
        self.require("classify")
        names = _listed(classes)
        _check_count("top", top)
        classes = zero_shot.class_embeddings(self.embed_text, names, _listed(templates))
        most = min(top or len(names), len(names))

        def work(pixels: Tensor, *_: object) -> list[list[tuple[str, float]]]:
            embeds = self.model.embed_image(self.model.vision(pixels))
            best = zero_shot.probabilities(embeds, classes, self.model.temperature).topk(most, dim=1)
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            return [[(names[i], chance) for i, chance in zip(*row, strict=True)] for row in rows]

        results = self._of_each(images, work)
        return results[0] if is_one(images) else results

    def explain(self, image: ImageInput | Images, text: str, layer: int | None = None) -> Explanation:
        """Show which parts of one image are evidence that a text matches it; `layer` as in `blip.inference.explain`."""
        self.require("explain")
        if not isinstance(text, str):
            raise ValueError(f"explain takes one text, got {reprlib.repr(text)}")
        parts = list(itertools.islice(self.tokens(image), 2))
        if len(parts) != 1 or len(parts[0]) != 1:
            raise ValueError("explain takes one image; call it for each of several")
        with self.computing():
            return explain.explain(self.model, self.tokenizer, parts[0], text, layer)

    # Inside ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokens(self, images: ImageInput | Images) -> Iterator[Tensor]:
        """Yield image tokens (B, P, V) of `batch` images at a time, the class token first."""
        for images_read in InputReader(self.transform, urls=self.urls).read(images, self.batch):
            with self.computing():
                yield self.model.vision(self._input(images_read))

    def _input(self, images: Sequence[InputImage]) -> Tensor:
        pixels = torch.stack([image.pixels for image in images])
        return pixels.to(self.device, next(self.model.parameters()).dtype, non_blocking=True)

    def _of_each(
        self,
        images: ImageInput | Images,
        work: Callable[[Tensor, list[InputImage], list[Any]], Iterable[T]],
        errors: str = "raise",
        *,
        keyed: bool = False,
        beside: Iterable[Any] | None = None,
    ) -> list[T | None]:
        """Results of `work(input, images, values)` on batches, one of each image; None if it cannot be read.

        `beside` has a value for each image.
        """
        if errors not in ("raise", "none"):
            raise ValueError(f'errors must be "raise" or "none", got {errors!r}')
        values = itertools.repeat(None) if beside is None else iter(beside)
        reader = InputReader(self.transform, urls=self.urls, keyed=keyed)
        results: list[T | None] = []
        for batch in reader.read(images, self.batch, skip=errors == "none"):
            pairs = [pair for pair in zip(batch, values, strict=False) if pair[0].pixels is not None]
            read, of_read = [list(part) for part in zip(*pairs, strict=True)] or ([], [])
            made: Iterator[T] = iter(())
            if read:
                with self.computing(), torch.no_grad():
                    made = iter(work(self._input(read), read, of_read))
            results += [None if image.pixels is None else next(made) for image in batch]
        return results

    def require(self, verb: str) -> None:
        """Raise ValueError, naming the recipe, if the model lacks the parts for a method."""
        kind, verbs = _KINDS[type(self.model)]
        if verb not in verbs:
            what, recipe = _WANTED[verb]
            raise ValueError(f"{kind} cannot {what}; load one of recipes.{recipe}")

    def options(self, where: str | None) -> dict[str, str]:
        """Options that answers depend on: the model's name, the SHA-256 of its weights, and the precision."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        add_to_digest(digest, self.model.state_dict())
        precision = str(self.precision).removeprefix("torch.")
        name = where or os.environ.get(MODEL_VARIABLE, "")
        return {"model": name, "weights": digest.hexdigest()[:16], "precision": precision}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context for every use of the model: its precision, and a one-line error if memory runs out."""
        try:
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(f"out of memory on {self.device}: give a smaller --batch, or --device cpu") from None


def _decoding(decode: DecodeConfig | str | None, num: int | None, seed: int) -> DecodeConfig:
    """Decoding settings with as many beams as texts. ValueError for an unknown preset."""
    name = "caption_2022" if decode is None else decode
    if not isinstance(name, DecodeConfig) and name not in DECODE_PRESETS:
        raise ValueError(f"decode must be a DecodeConfig or one of {', '.join(DECODE_PRESETS)}, got {name!r}")
    config = DECODE_PRESETS[name] if isinstance(name, str) else name
    _check_count("num", num)
    num = 1 if num is None else num
    beams = max(config.beams, num) if config.method == "beam" and config.beams > 1 else config.beams
    return dataclasses.replace(config, num=num, beams=beams, seed=seed)


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not (isinstance(value, Integral) and value >= 1):
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")


def _shaped(best: list[Any], num: int | None, details: bool) -> Any:
    """The best of some texts if no number was given, else all of them; their words alone, or with `details`."""
    chosen = best if details else [one.text for one in best]
    return chosen[0] if num is None else chosen


def _cleaned_question(question: str) -> str:
    if not (cleaned := clean_question(question)):
        raise ValueError(f"the question {question!r} has no words")
    return cleaned


def _listed(texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else [texts]
    for text in listed:
        if not isinstance(text, str):
            raise ValueError(f"expected a text or a list of texts, got {reprlib.repr(text)}")
    return listed


def open_model(
    where: str | Path,
    kind: type | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    precision: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
    batch: int = 16,
    urls: bool = False,
    once: bool = False,
) -> Loaded:
    """Load a model, as `blip.load` does; `kind` is the expected class, any if None, and `precision` that of autocast.

    With `once` the note on what a model was trained on is printed once in a process.

    One-line ValueError or OSError if the model or the device is not available.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type of torch, such as torch.bfloat16, got {dtype!r}")
    place = _device(device)
    local = checkpoint.locate(where, revision)
    source = checkpoint.opened(local)
    if kind is None:
        model, words = checkpoint.built(source, image_size=image_size, tokenizer=tokenizer)
    else:
        model, words = checkpoint.from_pretrained(source, kind, image_size=image_size, tokenizer=tokenizer)
    print_note(source.trained_on, once=once)
    return Loaded(
        model.to(place, dtype),
        words,
        EvalTransform(model.config.vision.image_size),
        place,
        precision,
        batch,
        urls,
        source.trained_on,
        local,
    )


def load(
    where: str | None,
    device: str,
    precision: str,
    kind: type = Blip,
    *,
    tokenizer: str | None = None,
    batch: int = 16,
) -> Loaded:
    """Load the model that --model, --device, --precision, --tokenizer and --batch describe; `kind` is its class.

    One-line ValueError or OSError if the model, device or precision is not available.
    """
    where = where or os.environ.get(MODEL_VARIABLE)
    if not where:
        raise ValueError(
            "no model: give --model DIR, a folder that training wrote (such as runs/demo/model) or a name on the hub, "
            f"or set the environment variable {MODEL_VARIABLE} to one"
        )
    place = _device(device)
    if precision == "float16" and place.type == "cpu":
        raise ValueError("--precision float16 needs a GPU; use float32 or bfloat16")
    computed = torch.float32 if precision == "auto" else getattr(torch, precision)
    return open_model(where, kind, device=place, precision=computed, tokenizer=tokenizer, batch=batch, once=True)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError, NotImplementedError, ...
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device} cannot be used here ({reason}); try cpu") from None
    return place
