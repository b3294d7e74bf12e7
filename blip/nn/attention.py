"""Scaled dot-product attention with the fastest kernel. R rows, H heads, T queries, P keys, d width of a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_is_faster(x: Tensor) -> bool:
    """Whether attention on tensors like x is faster as two matrix products than with PyTorch's fused kernel.

    It is in bfloat16 on a CPU, also under autocast: 2 times forward and 3 to 9 times with backward (docs/log.md).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """(R, H, T, d), (R, H, P, d) twice -> (R, H, T, d); `mask` is True where a query attends, `causal` needs T = P."""
    if not plain_is_faster(query):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout, dropout > 0) @ value
