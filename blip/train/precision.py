"""The number format of matrix products, the same in every process of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blip import dist
from blip.train.settings import TrainConfig


def precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Choose the type of matrix products: as set, or for `auto` bfloat16 where all processes' hardware has it."""
    if config.precision == "auto":
        return torch.bfloat16 if all_multiply_bfloat16(device) else torch.float32
    if config.precision == "float16" and device.type != "cuda":
        raise ValueError(f"train.precision float16 needs a CUDA device, not {device}; use bfloat16 or float32")
    return getattr(torch, config.precision)


def all_multiply_bfloat16(device: torch.device) -> bool:
    """Whether every process's hardware multiplies bfloat16: replicas must compute in one number format."""
    return not dist.any_process(not multiplies_bfloat16(device))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix products (not an emulation), and oneDNN is allowed to use them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False  # ONEDNN_MAX_CPU_ISA hides it from oneDNN
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported()


class CastOnce:
    """The weights of a module's linear layers and convolutions in the type of its matrix products, cast once a step.

    One operation casts all weights of a block, and one their gradients; what is not trained, such as a teacher, is cast
    whole. Autocast has an operation for each tensor and casts what needs no gradient at every use. A GPU waits for its
    host to launch so many small kernels.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.like = torch.empty((), dtype=dtype)
        units: dict[str, list[tuple[nn.Module, str]]] = {}
        for path, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                for name, weight in part.named_parameters(recurse=False):
                    if hasattr(weight, "device_mesh"):
                        continue  # a shard, which is gathered and cast when it is used
                    block = re.match(r".*?blocks\.\d+", path)
                    unit = "" if block is None else block[0]
                    units.setdefault(unit if weight.requires_grad else "untrained", []).append((part, name))
        self.units = list(units.values())

    @contextmanager
    def used(self) -> Iterator[None]:
        """Compute with the cast weights, forward and backward; the module's parameters stay as they are.

        A module finds an attribute of its own before a parameter of that name.
        """
        try:
            for unit in self.units:
                casts = _Cast.apply(self.like, *(part._parameters[name] for part, name in unit))
                for (part, name), cast in zip(unit, casts, strict=True):
                    part.__dict__[name] = cast
            yield
        finally:
            for unit in self.units:
                for part, name in unit:
                    part.__dict__.pop(name, None)


class _Cast(torch.autograd.Function):
    """Copies of tensors in the type of another, by one operation; so are their gradients in the tensors' own type."""

    @staticmethod
    def forward(ctx, like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        casts = tuple(torch.empty_like(tensor, dtype=like.dtype) for tensor in tensors)
        torch._foreach_copy_(casts, tensors)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(cast for cast, needs in zip(casts, needed, strict=True) if not needs))
        return casts

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        given = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[1 + i]]
        wide = [torch.empty_like(grads[i], dtype=ctx.dtypes[i]) for i in given]
        if given:
            torch._foreach_copy_(wide, [grads[i] for i in given])
        at = dict(zip(given, wide, strict=True))
        return None, *(at.get(i) for i in range(len(grads)))
