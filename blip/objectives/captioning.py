"""Captioning loss, or language modelling: LM (paper, section 3.2). R texts of T tokens, N tokens to predict in all."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blip.models.blip import starting_with
from blip.nn.context import Context
from blip.nn.text import TextPass
from blip.objectives.batch import Batch

IGNORED = -100
"""Target value of a token that is not learned."""


def decoding_pass(ids: Tensor, keep: Tensor, dec_id: int, context: Context) -> tuple[TextPass, Tensor]:
    """Build the decoder's pass over texts (R, T), and its targets, the next tokens (R, T - 1): `IGNORED` at padding.

    Each token but the last predicts the next, so the last is no input.
    """
    decode = TextPass(starting_with(ids, dec_id)[:, :-1], keep[:, 1:], causal=True, context=context)
    return decode, ids[:, 1:].masked_fill(~keep[:, 1:], IGNORED)


def caption_pass(batch: Batch, dec_id: int, context: Context) -> tuple[TextPass, Tensor]:
    """Build the decoder's pass over a batch's captions, and its targets (N,), with the prompt `IGNORED`."""
    decode, targets = decoding_pass(batch.ids, batch.keep, dec_id, context)
    targets[:, : batch.prompt] = IGNORED
    return decode, decode.layout.pack_ids(targets)


def captioning_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy of logits (N, vocabulary), mean over the targets (N,) that are not `IGNORED`."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing)


def token_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of the targets (N,) that are predicted: the largest of their logits (N, vocabulary)."""
    return (logits.detach().argmax(1) == targets).sum() / (targets != IGNORED).sum()
