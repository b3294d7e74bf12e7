"""A linear layer that uses oneDNN's float32 matrix product where the default one is slow.

PyTorch multiplies float32 matrices on a CPU with MKL, which reaches about half of oneDNN's rate on AMD processors (both
come with PyTorch; the figures are in docs/log.md). The choice depends on the processor alone, so a run that continues
on the same machine computes the same bits. N rows, I inputs, O outputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:2000]
    except OSError:
        return False


ONEDNN = _amd() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether float32 products on the CPU go to oneDNN."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if need_x else None,
            _product(grad.t(), x.t()) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., I) times weight (O, I) plus bias (O,) -> (..., O); `torch.nn.functional.linear` by the faster library."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.numel() == 0
    if not ONEDNN or plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    product = _OneDnnLinear.apply if torch.is_grad_enabled() else _product
    return product(flat, weight, bias).view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def adopt(module: nn.Module) -> nn.Module:
    """Make the linear layers inside another library's module compute by `linear`, with the same weights."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
    return module
