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


def prepared(mask: Tensor, x: Tensor) -> Tensor:
    """Put a mask (..., T, P) bool for tensors like x in the form that `attention` takes without a further operation.

    That is the mask itself on a CPU, and elsewhere what is added to the scores, 0 or minus infinity: PyTorch would
    convert the mask again in every layer.
    """
    kind = x.device.type
    if kind == "cpu":
        return mask
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    length = mask.shape[-1]
    # Its rows start at multiples of 8 numbers, or the kernel would copy it.
    bias = torch.zeros(*mask.shape[:-1], -(-length // 8) * 8, dtype=dtype, device=mask.device)
    return bias[..., :length].masked_fill_(~mask, float("-inf"))


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """(R, H, T, d), (R, H, P, d) twice -> (R, H, T, d); `causal` needs T = P.

    `mask` is True where a query attends, or `prepared`.
    """
    if not plain_is_faster(query):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout, dropout > 0) @ value
