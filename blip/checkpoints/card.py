"""Model card of converted weights: description, how to load them, differences of the other program, licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blip.checkpoints.foreign import HEADS_KEY, ForeignLayout

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
    return "\n".join([*front, "", *body, "", "## Licence", "", licence_note(origin), ""])


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
