"""Writing: decoding over a cache, token ids in, token ids out. R rows of text, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from blip.med import Cache, Context
from blip.model import Blip


@torch.no_grad()
def greedy(model: Blip, context: Context, prompt: Tensor, max_length: int) -> Tensor:
    """Continue each prompt (R, T) with the likeliest word, up to `max_length` tokens or [SEP]; pads follow a [SEP].

    Row r looks at context r. The prompts start with [DEC] and are of one length. Returns (R, at most max_length).
    ValueError if `max_length` exceeds the model's positions or leaves nothing to write.
    """
    text = model.config.text
    rows, length = prompt.shape
    if not length < max_length <= text.max_positions:
        raise ValueError(f"max_length must be {length + 1} to {text.max_positions}, got {max_length}")
    cache = Cache(text, rows, max_length, context.projected[0])
    ids, done = prompt, torch.zeros(rows, dtype=torch.bool, device=prompt.device)
    for at in range(max_length - 1):
        states = model.med.step(ids[:, at], cache, context)
        if at < length - 1:
            continue
        word = model.med.vocabulary(states).argmax(1).masked_fill(done, text.pad_id)
        ids = torch.cat([ids, word[:, None]], dim=1)
        done |= word == text.sep_id
        if done.all():
            break
    return ids
