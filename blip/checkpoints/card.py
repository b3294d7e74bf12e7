"""Model cards: what a model does and how to use it, its scores by data set, what it was trained on, licence, limits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from blip.checkpoints.foreign import HEADS_KEY, ForeignLayout
from blip.models.families import TASKS, names_of
from blip.origin import NOTE, is_synthetic

WEIGHTS = {"transformers": "model.safetensors", "original": "model.pth"}
"""Name of the weight file."""


@dataclass(frozen=True)
class Provenance:
    """Source of converted weights, for the card."""

    name: str
    """Name of the checkpoint, without local folders."""
    layout: str
    licence: str | None = None
    """Licence, as named on the hub; None if unknown."""
    trained_on: tuple[str, ...] = ()
    """Origins of the images that it was trained on, if known."""


_TWO_LINES = {
    "captioning": """from transformers import AutoProcessor, BlipForConditionalGeneration

model, processor = BlipForConditionalGeneration.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
ids = model.generate(**processor(image, "a picture of", return_tensors="pt"), num_beams=3, max_length=20, min_length=5)
print(processor.decode(ids[0], skip_special_tokens=True))""",
    "matching": """from transformers import AutoProcessor, BlipForImageTextRetrieval

model, processor = BlipForImageTextRetrieval.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
print(model(**processor(image, "a dog", return_tensors="pt")).itm_score.softmax(-1)[:, 1])  # probability of a match""",
    "vqa": """from transformers import AutoProcessor, BlipForQuestionAnswering

model, processor = BlipForQuestionAnswering.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
ids = model.generate(**processor(image, "what is it?", return_tensors="pt"), num_beams=3, max_length=10)
print(processor.decode(ids[0], skip_special_tokens=True))""",
}
_DIFFERENT = {
    "captioning": """\
- `generate` takes beams and lengths only from its arguments; generation_config.json is loaded but not used.
- `generate` compares beams by the length of the generated tokens, the end token included, and has no other rule; the
  preset `caption_2022` of openblip compares them as the original did, so some captions differ. `--length-rule
  generated` of `blip caption` gives the same captions as `generate`.
- In a batch of prompts of different lengths the last column is cut off, so shorter prompts keep their end token and
  give wrong captions: use prompts of the same length.""",
    "matching": """\
- The matching head was trained with [ENC] as a text's first token, and transformers uses the tokenizer's first token.
  So the tokenizer in this folder begins texts with [ENC], and `itm_score` is the same as in openblip.
- Cosines (`use_itm_head=False`) were trained with [CLS]: for them set
  `inputs.input_ids[:, 0] = processor.tokenizer.cls_token_id`.""",
    "vqa": """\
- Questions were trained with [ENC] as their first token; the tokenizer in this folder adds it.
- The mask of padded questions is ignored when answers attend to them, so answers depend on the padding: ask one
  question at a time, or questions of the same length.
- transformers generates answers freely; it cannot rank candidates, as the paper does.""",
}
_ALL_DIFFERENT = """\
- Its default image processor resizes with torchvision, which differs from training by up to 0.015; the one that uses
  PIL is exact.
- Heads and epsilons are the model's own, set in config.json; transformers' defaults differ.
- It has no temperature, momentum teacher or queues."""


# Models of ours -------------------------------------------------------------------------------------------------------

Use = Literal["caption", "classify", "answer"]
"""What a model is mainly for: the verb of its example."""


class Measured(NamedTuple):
    """A score of a model."""

    dataset: str
    """Name of the data set."""
    split: str
    metric: str
    """Name of the score, as evaluations give it."""
    value: float


@dataclass(frozen=True)
class Facts:
    """What a training run knows about its model, for the card."""

    about: str
    """Description: how it was trained."""
    sources: Sequence[str] = ()
    """Training data, one line each."""
    scores: Sequence[Measured] = ()
    use: Use | None = None
    """Main use; by the model's class if None."""


class _Example(NamedTuple):
    pipeline: str
    """Task by the hub's name."""
    line: str
    """Line of code that uses a loaded model."""


_EXAMPLES: dict[str, _Example] = {
    "caption": _Example("image-to-text", 'print(model.caption("photo.jpg"))'),
    "classify": _Example("zero-shot-image-classification", 'print(model.classify("photo.jpg", ["dog", "cat"]))'),
    "answer": _Example("visual-question-answering", 'print(model.answer("photo.jpg", "how many dogs are there?"))'),
}
_USE_OF: dict[tuple[str, str], Use] = {
    ("blip", "all"): "caption",
    ("blip", "writing"): "caption",
    ("blip", "matching"): "classify",
    ("vqa", "all"): "answer",
}
"""Main use of the models of a task and parts; others have no verb of their own."""
_METRICS = {
    "cider": ("cider", "CIDEr"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "meteor": ("meteor", "METEOR"),
    "spice": ("spice", "SPICE"),
    "accuracy": ("accuracy", "Accuracy"),
    "mrr": ("mrr", "Mean reciprocal rank"),
    "ndcg": ("ndcg", "NDCG"),
    "mean_rank": ("mean_rank", "Mean rank"),
    "mean_recall": ("recall", "Mean of the recalls"),
    "attribute_precision": ("precision", "Attribute precision"),
    "attribute_recall": ("recall", "Attribute recall"),
    "all_true": ("accuracy", "Captions without a false claim"),
}
"""Our score -> type and name of the metric on the hub."""
_HERE = "path/to/this/folder"
"""Folder that the example of a card loads, unless the model has a name on the hub."""
_LONGEST = 100
"""Most characters of a name."""
_DIRECTIONS = {"tr": "Image to text", "ir": "Text to image", "r": "Recall"}


def metric_of(score: str) -> tuple[str, str]:
    """Type and name on the hub of a score as evaluations name it; any text gives valid ones."""
    if score in _METRICS:
        return _METRICS[score]
    if order := re.fullmatch(r"bleu_(\d)", score):
        return "bleu", f"BLEU-{order[1]}"
    if recall := re.fullmatch(r"(tr|ir|r)(?:@|_)(\d+)(_itc)?", score):
        direction = _DIRECTIONS[recall[1]]
        name = f"Recall@{recall[2]}" if direction == "Recall" else f"{direction} recall@{recall[2]}"
        return "recall", name + ", by ITC alone" * bool(recall[3])
    kind = re.sub(r"[^a-z0-9_]+", "_", score.lower()).strip("_")
    return kind[:_LONGEST] or "score", _plain(score.replace("_", " ")) or "score"


def _plain(text: str) -> str:
    """A name on one line, without what is not printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_LONGEST]


def own_card(model: Any, body: str | Facts, licence: str | None, trained_on: Sequence[str], where: str = _HERE) -> str:
    """README.md of a model folder of ours: metadata as the hub reads it, then text.

    `body` is the text, or the facts to write it from; `where` is the name or folder that the example loads. Scores that
    are not finite numbers are left out. That a model knows only synthetic shapes is added to any text.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    task, parts = names_of(type(model))
    facts = Facts(body) if isinstance(body, str) else body
    use = facts.use or _USE_OF.get((task, parts))
    pipeline = _EXAMPLES[use].pipeline if use else next(tag for tag in TASKS[task].tags)
    scores = [one for one in facts.scores if isinstance(one.value, int | float) and math.isfinite(one.value)]
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=_slug(one.dataset),
            dataset_name=_plain(one.dataset) or "data",
            dataset_split=_plain(one.split) or None,
            metric_type=metric_of(one.metric)[0],
            metric_name=metric_of(one.metric)[1],
            metric_value=one.value,
        )
        for one in scores
    ]
    data = ModelCardData(
        library_name="openblip",
        license=licence or "other",
        pipeline_tag=pipeline,
        tags=["blip", *TASKS[task].tags],
        model_name=(type(model).__name__ if where == _HERE else _slug(where.rpartition("/")[2])) if results else None,
        eval_results=results or None,
    )
    if isinstance(body, str) and body:
        text = [body.strip(), f"Note: {NOTE}." if is_synthetic(trained_on) else ""]
    else:
        text = _text(model, facts, use, trained_on, scores, where)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, text)) + "\n"))


def _text(
    model: Any, facts: Facts, use: str | None, trained_on: Sequence[str], scores: Sequence[Measured], where: str
) -> list[str]:
    about = facts.about or f"A {type(model).__name__} model of openblip."
    text = [about if about.startswith("#") else f"# {type(model).__name__}\n\n{about}", "## Use"]
    text += [_usage(model, use, where), "## Training data", _origins(trained_on)]
    text += ["\n".join(f"- {line}" for line in facts.sources)]
    if scores:
        text += ["## Scores", _table(scores)]
    return [*text, "## Limits", _limits(model, trained_on)]


def _slug(name: str) -> str:
    """A data set's or model's name in the letters that the hub allows."""
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).strip("-./") or "data"


def _usage(model: Any, use: str | None, where: str) -> str:
    if use:
        lines = ["import blip", "", f"model = blip.load({where!r})".replace("'", '"'), _EXAMPLES[use].line]
    else:
        kind = type(model)
        lines = [
            "from blip.checkpoints.checkpoint import from_pretrained",
            f"from {kind.__module__} import {kind.__name__}",
            "",
            f"model, tokenizer = from_pretrained({where!r}, {kind.__name__})".replace("'", '"'),
        ]
    return "\n".join(["```python", *lines, "```"])


def _origins(trained_on: Sequence[str]) -> str:
    return f"Images: {', '.join(trained_on)}." if trained_on else "What its images were is not recorded."


def _table(scores: Iterable[Measured]) -> str:
    def cell(text: str) -> str:
        return _plain(text).replace("|", "\\|")

    rows = [
        f"| {cell(one.dataset)} | {cell(one.split)} | {cell(metric_of(one.metric)[1])} | {one.value:g} |"
        for one in scores
    ]
    return "\n".join(["| data | split | metric | value |", "|---|---|---|---|", *rows])


def _limits(model: Any, trained_on: Sequence[str]) -> str:
    side = model.config.vision.image_size
    lines = [f"Note: {NOTE}."] if is_synthetic(trained_on) else []
    lines += [
        f"Images are resized to {side} x {side} pixels, whatever their shape. Texts are lower-case, in the language of "
        "the training data; words unknown to the tokenizer are lost. Answers can be wrong, and repeat what is common "
        "or unfair in the training data: check them before anything depends on them."
    ]
    return "\n\n".join(lines)


# Converted weights ----------------------------------------------------------------------------------------------------


def card(layout: ForeignLayout, origin: Provenance, model: Any) -> str:
    """README.md of an exported model."""
    program = {"transformers": "transformers", "original": "the code of salesforce/BLIP (2022)"}[layout.program]
    front = ["---", f"library_name: {'transformers' if layout.program == 'transformers' else 'pytorch'}"]
    if origin.licence:
        front.append(f"license: {origin.licence}")
    else:
        front += ["license: other", "license_name: as-the-source", "license_link: README.md"]
    front += ["tags:", "- blip", "---"]
    side = model.config.vision.image_size
    body = [
        f"# A BLIP for {layout.name}, in the layout of {program}",
        "",
        f"Converted by openblip from {origin.name} ({origin.layout}). Images of {side} x {side} pixels, "
        f"a vocabulary of {model.config.text.vocab_size} word pieces.",
        "",
    ]
    if layout.program == "transformers":
        body += ["```python", _TWO_LINES[layout.name], "```", "", "## What transformers does differently", ""]
        body += [_DIFFERENT[layout.name], _ALL_DIFFERENT]
    else:
        body += [
            f"`{WEIGHTS['original']}` holds `{{'model': ...}}` as that code's `load_checkpoint` reads it, including "
            "all names of shared tensors. The momentum teacher, if its class has one, is a copy of the student; there "
            "are no queues. Sizes other than ViT-B and ViT-L need changes in its config files; "
            f"`{HEADS_KEY}` beside the weights gives openblip the number of heads.",
        ]
    limits = ["", "## Limits", "", f"Note: {NOTE}."] if is_synthetic(origin.trained_on) else []
    return "\n".join([*front, "", *body, *limits, "", "## Licence", "", licence_note(origin), ""])


def licence_note(origin: Provenance) -> str:
    """Sentence on the weights' licence, as far as it is known."""
    if origin.licence:
        return f"The weights have the licence of {origin.name}: {origin.licence}. Converting them does not change it."
    return (
        f"The weights have the licence of {origin.name}, which a weight file does not state. The checkpoints that "
        "Salesforce released with BLIP and LAVIS are under the BSD 3-Clause licence, whose notice must be included; "
        "others have their own licences. Add the licence here before you pass this on."
    )


def plain_card(origin: Provenance) -> str:
    """The body of README.md of a model folder of ours that was converted."""
    return f"# {origin.name}\n\nConverted from {origin.layout}.\n\n## Licence\n\n{licence_note(origin)}\n"
