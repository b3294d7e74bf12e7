"""Count the operations that a pre-training step launches on a GPU, on a CUDA device that is not there.

    python tests/launches.py base 96      # by kind, with the bytes that each kind writes

Views and allocations launch nothing and are left out. What PyTorch does to many tensors by one call counts as one.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import DEVICE, FakeCuda, backward
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip.models.blip import Blip
from blip.models.presets import PRESETS, usual_options
from blip.models.settings import BlipConfig
from blip.objectives.batch import Batch
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain, PretrainConfig
from blip.train.precision import CastOnce

aten = torch.ops.aten
SILENT = {
    "alias",
    "detach",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "_unsafe_view",
}
LARGE = 1 << 20


class Launches(TorchDispatchMode):
    """Counts operations of the device by name, and how many of them write more than a megabyte."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.large, self.written = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, returned = func.overloadpacket.__name__, [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        ours = any(isinstance(x, FakeTensor) for x in [*returned, *tree_leaves(args)])
        if ours and not view and name not in SILENT:
            written = sum(x.numel() * x.element_size() for x in returned)
            self.count[name] += 1
            self.large[name] += written > LARGE
            self.written[name] += written
        return result


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
    """What PyTorch's attention launches on a GPU, which it does not choose where there is none."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    length = attn_mask.shape[-1]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    assert attn_mask.dtype == query.dtype
    if any(stride % 8 for stride in attn_mask.stride()[:-1]):
        attn_mask = F.pad(attn_mask, (0, -length % 8))[..., :length]
    bias = attn_mask.expand(*query.shape[:3], length)
    grad = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, grad, dropout_p, is_causal)[0]


def pretraining(monkeypatch, config: BlipConfig, size: int, cast_once: bool = True) -> dict[str, Launches]:
    """Operations of each part of a step in bfloat16, `size` texts of up to 23 tokens with their images."""
    parts = {name: Launches() for name in ("casts", "forward", "backward", "clip", "optimizer", "after_step")}
    with FakeCuda().installed(monkeypatch) as cuda:
        cuda.strict = False
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        with torch.device("meta"):
            run = Pretrain(Blip(config, usual_options(config.text)), PretrainConfig(alpha_ramp_epochs=0)).train()
        run._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=DEVICE))
        ids, side = torch.ones(size, 23, dtype=torch.int64, device=DEVICE), config.vision.image_size
        batch = Batch(torch.empty(size, 3, side, side, device=DEVICE), ids, ids > 0, [""] * size)
        trained = [p for p in run.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        casts = CastOnce(run, torch.bfloat16).used() if cast_once else nullcontext()
        with parts["casts"]:
            casts.__enter__()
        with parts["forward"], torch.autocast("cuda", torch.bfloat16):
            outcome = run(batch, Clock(epoch=1.0))
            loss = sum(outcome.losses.values())
        with parts["backward"]:
            backward(loss)
        casts.__exit__(None, None, None)
        with parts["clip"]:  # in one call for all on a GPU, which PyTorch does not choose for these tensors
            norm = get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
            clip_grads_with_norm_(trained, 1.0, norm, foreach=True)
        optimizer.step()
        with parts["optimizer"]:
            optimizer.step()
        with parts["after_step"]:
            run.after_step([outcome.carry])
    return parts


def main() -> None:
    config, size = PRESETS[sys.argv[1]], int(sys.argv[2])
    with pytest.MonkeyPatch.context() as patch:
        parts = pretraining(patch, config, size)
    for name, part in parts.items():
        print(f"{name}: {part.count.total()}")
        for kind, count in part.count.most_common(25):
            print(f"  {kind:<48}{count:>5}{part.large[kind]:>5} over 1 MB{part.written[kind] / 1e6:>8.0f} MB")
    print("all:", sum(part.count.total() for part in parts.values()))


if __name__ == "__main__":
    main()
