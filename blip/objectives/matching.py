"""Image-text matching: ITM (paper, section 3.2).

B batch, R rows of logits, P image tokens, V vision width, D text width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip import dist
from blip.models.blip import Blip, starting_with
from blip.nn.context import Context
from blip.nn.text import TextPass
from blip.objectives.batch import Batch


class Mismatches(NamedTuple):
    """Hard negatives of a batch: indices into the batch, or into the batches of all processes."""

    image_of_text: Tensor
    """(B,) for each text an image that it does not describe."""
    text_of_image: Tensor
    """(B,) for each image a text that does not describe it."""


def matching_passes(
    model: Blip, batch: Batch, tokens: Tensor, context: Context, mismatches: Mismatches, everywhere: bool
) -> tuple[TextPass, TextPass]:
    """Build two passes for `match_logits`: images with their text and a hard negative, texts with a hard negative.

    `context` is the projection of the images' `tokens` (B, P, V); with `everywhere` the indices refer to the batches of
    all processes.
    """
    ids, keep = starting_with(batch.ids, model.config.text.enc_id), batch.keep
    image_of_text, text_of_image = mismatches
    if everywhere:
        all_ids, all_keep = dist.gather_padded(ids), dist.gather_padded(keep)
        others = dist.gather_with_gradient(tokens).index_select(0, image_of_text)
        other_context = model.context(others)
        other_ids, other_keep = all_ids[text_of_image], all_keep[text_of_image]
    else:
        other_context, other_ids, other_keep = context[image_of_text], ids[text_of_image], keep[text_of_image]
    # Two texts attend to each image: its own and a hard negative.
    own = TextPass(_pairwise(ids, other_ids), _pairwise(keep, other_keep), context=context.expand(2), first=True)
    return own, TextPass(ids, keep, context=other_context, first=True)


def match_logits(model: Blip, own_states: Tensor, other_states: Tensor) -> Tensor:
    """States (2 B, D) and (B, D) of `matching_passes` -> logits (3 B, 2).

    First the pairs themselves, then texts with a hard negative image, then images with a hard negative text.
    """
    own, hard_texts = own_states.view(len(other_states), 2, -1).unbind(1)
    return model.match_head(torch.cat([own, other_states, hard_texts]))


def matching_loss(logits: Tensor, positives: int, counted: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (R, 2), of which the first `positives` rows are matches.

    The mean is over the rows that `counted` (R,) bool marks, by default over all.
    """
    labels = _labels(logits, positives)
    if counted is None:
        return F.cross_entropy(logits, labels)
    each = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(counted, each, 0).sum() / counted.sum()


@torch.no_grad()
def match_accuracies(logits: Tensor, positives: int, counted: Tensor | None = None) -> dict[str, Tensor]:
    """Accuracies on matches and on mismatches; on the `counted` of the latter, 0 if there is none."""
    correct = (logits.argmax(1) == _labels(logits, positives)).float()
    match, mismatch = correct[:positives], correct[positives:]
    if counted is not None:
        counted = counted[positives:]
        mismatch = torch.where(counted, mismatch, 0).sum() / counted.sum().clamp(min=1)
    return {"itm_accuracy_match": match.mean(), "itm_accuracy_mismatch": mismatch.mean()}


def _labels(logits: Tensor, positives: int) -> Tensor:
    """(R,) int64: 1 for the first `positives` rows, else 0."""
    return (torch.arange(len(logits), device=logits.device) < positives).long()


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Interleave (B, T) and (B, U), U >= T, to rows a0 b0 a1 b1 ...; texts of other processes may be longer."""
    return torch.stack([F.pad(a, (0, b.shape[1] - a.shape[1])), b], 1).flatten(0, 1)
