"""Settings of the training loop: duration, schedule, optimizer, checkpoints and safety."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip.settings import check_positive, check_rates, require
from blip.train.towers import Tower


@dataclass(frozen=True)
class TrainConfig:
    """Duration, schedule, optimizer, checkpoints and safety of training."""

    epochs: float = 20.0
    """Passes over the data; ignored if `steps` is given."""
    steps: int | None = None
    """Number of optimizer steps; `null` to train for `epochs`."""
    batch_size: int = 75
    """Pairs per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Final learning rate."""
    warmup_steps: int = 3000
    """Steps of linear warm-up."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    schedule: Literal["cosine", "epoch_decay", "epoch_cosine", "constant"] = "cosine"
    """Schedule after warm-up: cosine by step, or by epoch as in 2022 (`epoch_decay` multiplies by `decay`)."""
    decay: float = 0.9
    """Factor per epoch of `epoch_decay`."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer. `muon` orthogonalises updates of the blocks' matrices: fewer steps for models trained from scratch."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    decay_all: bool = False
    """Also decay norms, biases, position embeddings and the temperature (2022: true)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float | None = 1.0
    """Gradient norm above which gradients are clipped (2022: none)."""
    towers: list[Tower] = field(default_factory=list)
    """Parts of the model that are locked for a time or have another learning rate."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numeric precision. `auto` is bfloat16 if the hardware supports it natively, else float32."""
    compile: bool = False
    """Compile the objective with torch.compile."""
    seed: int = 0
    """Random seed of the run; every random number is a function of it, the step, the sample and the process."""
    log_every: int = 50
    """Steps between log lines."""
    save_every: int = 1000
    """Steps between resumable checkpoints."""
    keep_checkpoints: int = 2
    """Number of resumable checkpoints kept."""
    eval_every: int = 0
    """Steps between evaluations; 0 for only at the end."""
    eval_each_epoch: bool = False
    """Evaluate at the end of every epoch, too."""
    trackers: list[str] = field(default_factory=list)
    """Trackers to log to: tensorboard, wandb, trackio; metrics.jsonl is always written."""
    skip_nonfinite: int = 0
    """Updates with a non-finite loss or gradient that may be skipped before the run stops."""
    allow_change: bool = False
    """Continue a run even if its settings changed."""
    timeout: float = 600.0
    """Seconds after which a process that lost its peers gives up."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size must be 1 or more, got {self.batch_size}")
        require(self.accumulate >= 1, f"accumulate must be 1 or more, got {self.accumulate}")
        require(self.steps is None or self.steps >= 1, f"steps must be 1 or more, got {self.steps}")
        check_positive(self.epochs, "epochs")
        require(self.save_every >= 1, f"save_every must be 1 or more, got {self.save_every}")
        require(self.keep_checkpoints >= 1, f"keep_checkpoints must be 1 or more, got {self.keep_checkpoints}")
        require(self.log_every >= 1, f"log_every must be 1 or more, got {self.log_every}")
        require(self.eval_every >= 0, f"eval_every must be 0 or more, got {self.eval_every}")
        require(self.warmup_steps >= 0, f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        check_rates(self, "lr", "min_lr", "warmup_lr", "weight_decay", "eps")
        require(0 < self.decay <= 1, f"decay must be in (0, 1], got {self.decay}")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}")
        check_positive(self.timeout, "timeout")
        require(self.clip is None or self.clip > 0, f"clip must be positive or null, got {self.clip}")
