"""Packing: the tokens of a batch go through linear layers one behind another, without padding.

R rows, T tokens of a row, N packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _Unpack(torch.autograd.Function):
    """Packed (N, D) -> grid (R*T, D), arbitrary at padding; forward and backward are plain gathers."""

    @staticmethod
    def forward(ctx, x: Tensor, cells: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (cells,) = ctx.saved_tensors
        return grad.index_select(0, cells), None, None


class _Pack(torch.autograd.Function):
    """Grid (R*T, D) -> packed (N, D); padding gets a zero gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        ctx.size = len(x)
        return x.index_select(0, cells)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (cells,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, cells, grad), None


class Layout:
    """Positions of tokens in a grid of R x T cells; converts between grid and packed tokens.

    On a CPU padding is left out of every linear layer: N is the number of real tokens. Elsewhere N = R * T, because
    asking how many tokens are real would make the device wait for the host. The results are the same.
    """

    def __init__(self, rows: int, length: int, keep: Tensor | None = None) -> None:
        """Mark the cells that hold tokens by `keep` (R, T) bool, one or more at the start of every row; None: all."""
        self.rows, self.length, self.keep = rows, length, keep
        on_cpu = keep is not None and keep.device.type == "cpu"
        packed = on_cpu and not bool(keep.all())
        self.mask = None if keep is None or (on_cpu and not packed) else keep[:, None, None, :]
        """(R, 1, 1, T) bool, True where a token may be attended to; None: everywhere."""
        self.cells: Tensor | None = None
        if packed:
            self.cells = keep.flatten().nonzero().squeeze(1)
            self.source = (keep.flatten().cumsum(0) - 1).clamp_(min=0)

    @property
    def tokens(self) -> int:
        """Number of packed tokens, N."""
        return self.rows * self.length if self.cells is None else len(self.cells)

    def pack(self, grid: Tensor) -> Tensor:
        """(R, T, D) -> (N, D)."""
        flat = grid.reshape(self.rows * self.length, -1)
        return flat if self.cells is None else _Pack.apply(flat, self.cells)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, D) -> (R, T, D), arbitrary at padding."""
        flat = packed if self.cells is None else _Unpack.apply(packed, self.cells, self.source)
        return flat.view(self.rows, self.length, -1)

    def pack_ids(self, grid: Tensor) -> Tensor:
        """(R, T) integers -> (N,)."""
        flat = grid.reshape(-1)
        return flat if self.cells is None else flat.index_select(0, self.cells)

    def first(self, packed: Tensor) -> Tensor:
        """(N, D) -> (R, D), the first token of each row."""
        if self.cells is None:
            return packed.view(self.rows, self.length, -1)[:, 0]
        return packed.index_select(0, self.source.view(self.rows, self.length)[:, 0])


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the packed tokens of several layouts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def split(x: Tensor, layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
    """Undo `join`."""
    return (x,) if len(layouts) == 1 else x.split([layout.tokens for layout in layouts])


def first_tokens(x: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """Joined tokens (N, D) -> the first of each row of each layout, joined."""
    return join([layout.first(part) for layout, part in zip(layouts, split(x, layouts), strict=True)])
