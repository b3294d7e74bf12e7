"""Collectives of torch.distributed that also answer in one process. W processes, B rows per process."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor

from blip import processes


def start(timeout: float = 600.0) -> None:
    """Join the other processes that torchrun, accelerate or SLURM started, if any; `timeout` in seconds.

    Harmless when already joined or alone. GPU tensors travel by NCCL, CPU tensors and objects by gloo.
    """
    _share_cores()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or torch_dist.is_initialized():
        return
    if not on_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "gloo" if on_cpu() else "cpu:gloo,cuda:nccl"
    torch_dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


_SHARDING = tuple(f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"))
_DECIDES = {
    "ACCELERATE_DYNAMO_BACKEND": "train.compile",
    "ACCELERATE_MIXED_PRECISION": "train.precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.accumulate",
}
"""Settings in accelerate's environment, and the settings of a run that replace them."""


def set_aside() -> list[str]:
    """Remove settings of accelerate's configuration that the run decides from the environment; returns notes on them.

    The file may be another project's. ValueError for sharding (FSDP and the like), because the state must not be
    sharded, except if a launcher took it from such a file for a single process, which has nothing to shard.
    """
    notes = []
    for name in _SHARDING:
        if os.environ.get(name, "").lower() in ("true", "1"):
            if not _launched() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(
                    f"{name} is set, and models are not sharded: unset it, launch with torchrun, or choose multi-GPU "
                    "or no distributed training in `accelerate config`"
                )
            del os.environ[name]
            notes.append(f"{name} of accelerate's configuration is set aside: one process has nothing to shard")
    for name, setting in _DECIDES.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "no", "1"):
            notes.append(f"{name}={value} of accelerate's configuration is set aside: {setting} decides")
    return notes


def _launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _share_cores() -> None:
    """Give each process its share of the machine's cores where the launcher left it one.

    Without a word about threads `accelerate launch` and torchrun set OMP_NUM_THREADS to 1, and the others would idle.
    OMP_THREAD_LIMIT, and the cores that a process is bound to, still limit it.
    """
    if on_cpu() and _launched() and os.environ.get("OMP_NUM_THREADS") == "1":
        mine = processes.cores()
        mine = min(mine, int(os.environ.get("OMP_THREAD_LIMIT", mine)))
        torch.set_num_threads(max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def on_cpu() -> bool:
    """Whether there is no GPU, or `accelerate launch --cpu` said not to use it."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


LOCAL_RANKS = (
    "LOCAL_RANK",
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PALS_LOCAL_RANKID",
)
"""Variables with a process's rank on its machine, of torchrun and accelerate, SLURM, and the MPIs."""


def own_device() -> torch.device:
    """Device of a process: the GPU of its local rank, or the only one it sees."""
    if on_cpu():
        return torch.device("cpu")
    local = next((int(os.environ[name]) for name in LOCAL_RANKS if os.environ.get(name, "").isdecimal()), 0)
    return torch.device("cuda", local % (torch.cuda.device_count() or local + 1))


def joined() -> bool:
    """Whether there is more than one process."""
    return torch_dist.is_available() and torch_dist.is_initialized() and torch_dist.get_world_size() > 1


def rank() -> int:
    """Rank of this process, from 0."""
    return torch_dist.get_rank() if joined() else 0


def world() -> int:
    """Number of processes that train together."""
    return torch_dist.get_world_size() if joined() else 1


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def gather(tensor: Tensor) -> Tensor:
    """(B, ...) of each process -> (W B, ...) in the order of ranks, without gradient; B must be the same everywhere."""
    tensor = tensor.detach()
    if not joined():
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world())]
    torch_dist.all_gather(parts, tensor)
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Gather as `gather`; the gradient of every process's loss flows back to the process that owns the rows."""
    return _Gather.apply(tensor) if joined() else tensor


def gather_padded(tensor: Tensor) -> Tensor:
    """Gather (B, T) with different T as (W B, longest T), padded with zeros on the right; without gradient."""
    if not joined():
        return tensor.detach()
    longest = torch.tensor([tensor.shape[1]])  # on the CPU, so that a GPU need not be waited for
    torch_dist.all_reduce(longest, torch_dist.ReduceOp.MAX)
    padded = F.pad(tensor, (0, int(longest) - tensor.shape[1]))
    # Neither gloo nor NCCL promises to carry booleans.
    return gather(padded.to(torch.uint8)).bool() if tensor.dtype == torch.bool else gather(padded)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch_dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_objects(value: Any) -> list[Any]:
    """Gather a small picklable value of each process, in the order of ranks; only among processes of one run."""
    if not joined():
        return [value]
    values: list[Any] = [None] * world()
    torch_dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if not joined():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(gather_objects(bool(flag)))


def total(values: Tensor) -> Tensor:
    """Sum of a tensor over processes, the same on each; a new tensor without gradient."""
    values = values.detach().clone()
    if joined():
        torch_dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if joined():
        torch_dist.barrier()


def lost_peer(error: BaseException) -> bool:
    """Whether a collective raised the error because another process is gone or stuck."""
    words = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "socket", "nccl", "gloo")
    wanted = isinstance(error, (torch_dist.DistError, RuntimeError))
    return joined() and wanted and any(word in str(error).lower() for word in words)
