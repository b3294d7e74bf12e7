"""The number format of matrix products, the same in every process of a run."""

from __future__ import annotations

import torch

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
