"""The one way by which values of tensors on a device reach the host.

A GPU works through a queue that the host fills ahead of it. A value that the host needs (`item`, `tolist`, `nonzero`,
an index of booleans) makes it wait until the queue is empty, so such reads are few and use this function, which a test
counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors of one device to the CPU, waiting for it once; tensors that are there are returned as they are."""
    device = tensors[0].device
    copies = tuple(tensor.to("cpu", non_blocking=device.type == "cuda") for tensor in tensors)  # pinned, if so
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return copies
