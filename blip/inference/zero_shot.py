"""Zero-shot classification: a class is the mean embedding of its name in several prompt templates.

C classes, N images, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blip.inference.features import cosines

TEMPLATES = (
    "{}",
    "a {}",
    "a picture of a {}",
    "a photo of a {}",
    "a picture of the {}",
    "a close up of a {}",
    "there is a {}",
)
"""Prompt templates; `{}` is the class's name, and "a" becomes "an" before a vowel."""
_VOWELS = tuple("aeiouAEIOU")


def texts_of(name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Put a class's name into the templates. ValueError for a template without `{}` or an empty name."""
    if not name.strip():
        raise ValueError("a class has an empty name")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} needs one {{}} where the name of the class goes")
    article = "an {}" if name.startswith(_VOWELS) else "a {}"
    spaced = (f" {template}".replace(" a {}", f" {article}").strip() for template in templates)
    return [template.replace("{}", name) for template in spaced]


def class_embeddings(
    embed_text: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Names of C classes -> embeddings (C, E) of length 1, each the mean over templates. Raises as `texts_of`.

    `embed_text` takes texts to joint embeddings of length 1.
    """
    if not names or not templates:
        raise ValueError(f"nothing to classify with: {len(names)} classes and {len(templates)} templates")
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise ValueError(f"class {repeated[0]!r} is named twice")
    texts = [text for name in names for text in texts_of(name, templates)]
    return F.normalize(embed_text(texts).view(len(names), len(templates), -1).mean(1), dim=-1)


def probabilities(image_embeds: Tensor, classes: Tensor, temperature: Tensor) -> Tensor:
    """Images (N, E) and classes (C, E) -> (N, C), a softmax over classes at the `temperature` that ITC learned."""
    with torch.no_grad():
        return (cosines(image_embeds, classes) / temperature.float()).softmax(-1)
