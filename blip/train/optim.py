"""Optimizers, their parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blip.train.settings import TrainConfig

_PLACES = ("pos_embed", "position", "cls_token", "temperature")
"""Parts of names of parameters that are not decayed, unless `decay_all` decays everything."""


def parameter_groups(
    module: nn.Module, weight_decay: float, decay_all: bool = False, scales: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Group trainable parameters into decayed and not decayed, for each learning-rate factor in `scales`.

    Norms, biases and anything else with fewer than two dimensions, position embeddings, the class token and the
    temperature are not decayed; with `decay_all` (2022) everything is. A shared parameter appears once.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        keep_as_is = parameter.ndim < 2 or any(word in name for word in _PLACES)
        key = (scales or {}).get(parameter, 1.0), keep_as_is and not decay_all
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[scale, rest], "weight_decay": 0.0 if rest else weight_decay, "lr_scale": scale}
        for scale, rest in sorted(groups)
    ]


def build(
    module: nn.Module,
    config: TrainConfig,
    scales: Mapping[nn.Parameter, float] | None = None,
    bfloat16: bool = True,
) -> torch.optim.Optimizer:
    """Build the optimizer of a run over `parameter_groups`; the module must be on its device already.

    `adamw` is fused AdamW for everything. `muon` leaves to AdamW what is not a matrix inside a transformer block, and
    gives each of those matrices an update with all its directions equally long, scaled to AdamW's size. It finds
    that update in `bfloat16`, as PyTorch does, or in float32, for hardware that multiplies no bfloat16. `scales` gives
    parameters their own factor of the learning rate, which the loop reads in the `lr_scale` of each group.
    """
    groups = parameter_groups(module, config.weight_decay, config.decay_all, scales)
    if not groups:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    adamw = partial(torch.optim.AdamW, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if config.optimizer == "adamw":
        return adamw(groups)
    matrices = {p for name, p in module.named_parameters() if p.ndim == 2 and "blocks." in name}
    inside = _only(groups, lambda p: p in matrices)
    outside = _only(groups, lambda p: p not in matrices)
    muon = partial(torch.optim.Muon if bfloat16 else Float32Muon, lr=config.lr, momentum=0.95)
    parts = [adamw(outside)] if outside else []
    return Together([*parts, muon(inside, adjust_lr_fn="match_rms_adamw")] if inside else parts)


def _only(groups: list[dict[str, Any]], wanted: Callable[[nn.Parameter], bool]) -> list[dict[str, Any]]:
    chosen = [{**group, "params": [p for p in group["params"] if wanted(p)]} for group in groups]
    return [group for group in chosen if group["params"]]


class Float32Muon(torch.optim.Muon):
    """Muon, scaled to AdamW's size, with matrix products in float32, where PyTorch always uses bfloat16.

    A processor without bfloat16 emulates it, 15 times slower. The optimizer state is that of PyTorch's Muon.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(p.shape)))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate the nearest orthogonal matrix (singular values near 1) by Newton-Schulz iteration.

    Each step applies the odd polynomial a s + b s^3 + c s^5 to the singular values.
    """
    a, b, c = coefficients
    wide = matrix.float() if len(matrix) <= matrix.shape[1] else matrix.float().mT
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if len(matrix) <= matrix.shape[1] else x.mT


class Together(torch.optim.Optimizer):
    """Several optimizers as one, for the loop, the gradient scaler and the checkpoint."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def learning_rate(step: int, config: TrainConfig, steps_per_epoch: float, total: int) -> float:
    """Learning rate of a step, 0 to `total` - 1.

    `cosine` and `constant` begin after `warmup_steps` of linear warm-up. `epoch_decay` and `epoch_cosine` change from
    epoch to epoch as in 2022, where the warm-up happened in the first epoch only, finished or not.
    """
    epoch = whole_epochs(step, steps_per_epoch)
    warming = step < config.warmup_steps
    match config.schedule:
        case "cosine" if not warming:
            progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
            return _cosine(config, progress)
        case "epoch_decay" if epoch > 0 or not warming:
            return max(config.min_lr, config.lr * config.decay**epoch)
        case "epoch_cosine" if epoch > 0 or not warming:
            epochs = config.epochs if config.steps is None else total / steps_per_epoch
            return _cosine(config, min(1.0, epoch / epochs))
        case "constant" if not warming:
            return config.lr
    return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps


def whole_epochs(steps: int, steps_per_epoch: float) -> int:
    """Number of epochs completed after some steps."""
    # A whole number of epochs must not be lost to the rounding of the division.
    return math.floor(steps / steps_per_epoch + 1e-9)


def _cosine(config: TrainConfig, progress: float) -> float:
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
