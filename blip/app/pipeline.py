"""`blip.pipeline`: what the pipelines `image-to-text` and `visual-question-answering` of transformers 4 returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from blip.app.load import load
from blip.app.loaded import Loaded
from blip.data.inputs import ImageInput, Images, is_one
from blip.inference.generate import generate, queries
from blip.inference.settings import DecodeConfig
from blip.nn.context import Context
from blip.nn.settings import TextConfig

_NEW_TOKENS = 20
"""Tokens that transformers' `generate` adds to a prompt unless told otherwise."""
_SAME = ("max_length", "min_length", "length_penalty", "repetition_penalty")
_RENAMED = {"num_beams": "beams", "num_return_sequences": "num"}
_KNOWN = ("max_new_tokens", *_RENAMED, *_SAME)
"""Arguments of transformers' `generate` that have an equal here."""


class ImageToText:
    """Captions as dictionaries: `pipe(image) == [{"generated_text": "two dogs"}]`, and a list of these for a list."""

    task = "image-to-text"

    def __init__(self, model: Loaded) -> None:
        """ValueError if the model cannot caption."""
        model.require("caption")
        self.model = model

    @overload
    def __call__(
        self, inputs: ImageInput, *, prompt: str | None = ..., max_new_tokens: int | None = ...,
        generate_kwargs: Mapping[str, Any] | None = ...,
    ) -> list[dict[str, str]]: ...  # fmt: skip
    @overload
    def __call__(
        self, inputs: Images, *, prompt: str | None = ..., max_new_tokens: int | None = ...,
        generate_kwargs: Mapping[str, Any] | None = ...,
    ) -> list[list[dict[str, str]]]: ...  # fmt: skip
    def __call__(self, inputs, *, prompt=None, max_new_tokens=None, generate_kwargs=None):
        """Caption an image, or several; images are given as in `Loaded.caption`.

        Texts begin with `prompt`, which is part of them. `generate_kwargs` are those of transformers' `generate` for
        greedy and beam search; ValueError names another.
        """
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt must be a text, got {type(prompt).__name__}")
        model, network = self.model, self.model.model

        def work(pixels: Tensor, *_: object) -> list[list[dict[str, str]]]:
            longest = network.config.text.max_positions + 2
            ids, _ = model.tokenizer.encode([prompt or ""], first="dec", max_length=longest)
            ids = ids[:, :-1]  # without the [SEP] that ends a text
            config = _decoding(generate_kwargs, max_new_tokens, ids.shape[1], network.config.text)
            context = network.context(network.vision(pixels), queries=queries(config, ids.shape[1]))
            texts = _generated(model, context, ids, config)
            return [[{"generated_text": text} for text in some] for some in texts]

        results = model._of_each(inputs, work)
        return results[0] if is_one(inputs) else results


class VisualQuestionAnswering:
    """Answers as dictionaries: `pipe(image=image, question="how many?") == [{"answer": "2"}]`.

    They are generated freely, as transformers does; `Loaded.answer` chooses among a model's answers.
    """

    task = "visual-question-answering"

    def __init__(self, model: Loaded) -> None:
        """ValueError if the model cannot answer questions."""
        model.require("answer")
        self.model = model

    def __call__(
        self,
        image: ImageInput | Images | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        question: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
    ) -> list[dict[str, str]] | list[list[dict[str, str]]]:
        """Answer a question about an image; dictionaries with `image` and `question` may be given instead.

        Several images, questions or dictionaries give a list of results: a question for each image, or, with lists of
        both, all images for the first question, then all for the second. `generate_kwargs` as in `ImageToText`.
        """
        pairs, is_single = _pairs(image, question)
        model, network = self.model, self.model.model
        longest = network.config.text.max_positions

        def work(pixels: Tensor, _: object, questions: list[str]) -> list[list[dict[str, str]]]:
            ids, keep = model.tokenizer.encode(questions, first="enc", max_length=longest)
            ids, keep = ids.to(pixels.device), keep.to(pixels.device)
            tokens = network.vision(pixels)
            context = network.context(ids, keep, network.question.context(tokens, queries=ids.shape[1]))
            starts = torch.full((len(questions), 1), network.config.text.dec_id)
            config = _decoding(generate_kwargs, max_new_tokens, 1, network.config.text)
            texts = _generated(model, context, starts, config)
            return [[{"answer": text.strip()} for text in some] for some in texts]

        results = model._of_each([one for one, _ in pairs], work, beside=[text for _, text in pairs])
        return results[0] if is_single else results


@overload
def pipeline(
    task: Literal["image-to-text"], model: str | Path | Loaded, *, revision: str | None = ...,
    device: str | torch.device = ..., batch_size: int = ...,
) -> ImageToText: ...  # fmt: skip
@overload
def pipeline(
    task: Literal["visual-question-answering"], model: str | Path | Loaded, *, revision: str | None = ...,
    device: str | torch.device = ..., batch_size: int = ...,
) -> VisualQuestionAnswering: ...  # fmt: skip
def pipeline(task, model, *, revision=None, device="auto", batch_size=16):
    """Make a function that returns what transformers 4 did for BLIP, decoding as its `generate` does by default.

    `model` is as in `blip.load`, or what that returned. ValueError for another task, or a model of another task.
    """
    kinds = {kind.task: kind for kind in (ImageToText, VisualQuestionAnswering)}
    if task not in kinds:
        raise ValueError(f"task must be one of {', '.join(kinds)}, got {task!r}")
    if isinstance(model, Loaded):
        return kinds[task](dataclasses.replace(model, batch=batch_size))
    return kinds[task](load(model, revision=revision, device=device, batch=batch_size))


def _decoding(
    given: Mapping[str, Any] | None, max_new_tokens: int | None, prompt: int, text: TextConfig
) -> DecodeConfig:
    """Settings from arguments of transformers' `generate`, after a prompt of so many tokens; by default greedy."""
    options = dict(given or {})
    if max_new_tokens is not None:
        if "max_new_tokens" in options:
            raise ValueError("max_new_tokens is given twice, once in generate_kwargs")
        options["max_new_tokens"] = max_new_tokens
    if options.pop("do_sample", False):
        raise ValueError('do_sample has no equal here: blip.load(...).caption(image, decode="nucleus") samples')
    unknown = sorted(options.keys() - {*_KNOWN})
    if unknown:
        raise ValueError(f"generate_kwargs has {unknown[0]!r}; known are {', '.join(_KNOWN)}")
    if (new := options.pop("max_new_tokens", None)) is not None:
        if not isinstance(new, int):
            raise ValueError(f"max_new_tokens must be a whole number, got {new!r}")
        options["max_length"] = prompt + new
    options.setdefault("max_length", min(prompt + _NEW_TOKENS, text.max_positions))
    settings = {_RENAMED.get(name, name): value for name, value in options.items()}
    return DecodeConfig(**{"beams": 1, "min_length": 0, **settings})


def _generated(model: Loaded, context: Context, prompts: Tensor, config: DecodeConfig) -> list[list[str]]:
    """Whole texts of each context, the prompt included."""
    prompts = prompts.expand(len(context), -1)
    ids = generate(model.model, context, prompts, torch.ones_like(prompts, dtype=torch.bool), config).ids
    texts = model.tokenizer.decode(ids.flatten(0, 1))
    return [texts[i : i + config.num] for i in range(0, len(texts), config.num)]


def _pairs(image: Any, question: Any) -> tuple[list[tuple[Any, str]], bool]:
    """Images with their questions, and whether there is a single one that was given as such."""
    if question is None:
        is_single = isinstance(image, Mapping)
        rows = [image] if is_one(image) else list(image)
        for row in rows:
            if not isinstance(row, Mapping) or not {"image", "question"} <= set(row):
                raise ValueError("give an image and a question, or dictionaries with `image` and `question`")
        pairs = [(row["image"], row["question"]) for row in rows]
    else:
        is_single = is_one(image) and isinstance(question, str)
        images = [image] if is_one(image) else list(image)
        questions = [question] if isinstance(question, str) else list(question)
        pairs = [(one, text) for text in questions for one in images]
    for _, text in pairs:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a question must be a text with words, got {text!r}")
    return pairs, is_single
