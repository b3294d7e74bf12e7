"""Keys and values from outside a row (of image tokens, states of a question, ...), projected once.

The keys and values of an image are the same for every text, every pass and every decoding step, so a cross-attention
never sees raw tokens, only a `Context`.

B contexts, R rows, T tokens of a row, P context tokens, D width, V context width, H heads, L cross-attentions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from blip.nn.attention import attention, plain_is_faster
from blip.nn.linear import Linear


@dataclass(eq=False, repr=False)
class Context:
    """Keys and values that rows of tokens attend to, for each cross-attention of a stack.

    `group_size` rows attend to each of the B contexts; the rows of one context are neighbours.
    """

    kv: list[Tensor]
    """L x (B, P, 2 D), keys, then values; or, grouped by head, L x (B, H, 2, P, D / H)."""
    heads: int
    """Number of heads, H."""
    keep: Tensor | None = None
    """(B, P) bool, False at padding; None: no padding."""
    group_size: int = 1
    """Number of rows that attend to each context."""

    def __len__(self) -> int:
        return len(self.kv[0])

    def __getitem__(self, index: Tensor) -> Context:
        """Select the contexts at `index` (M,), for M x group_size rows."""
        keep = None if self.keep is None else self.keep[index]
        return replace(self, kv=[part.index_select(0, index) for part in self.kv], keep=keep)

    def expand(self, group_size: int) -> Context:
        """Share each context among `group_size` times as many neighbouring rows, without a copy."""
        return replace(self, group_size=self.group_size * group_size)

    def attend(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        """Attend from queries (B * group_size, T, D) in cross-attention number `layer` -> (B * group_size, T, D)."""
        rows, length, width = query.shape
        if rows != len(self) * self.group_size:
            raise ValueError(f"{rows} texts for {len(self)} contexts with {self.group_size} texts each")
        query = query.reshape(len(self), self.group_size * length, self.heads, -1).transpose(1, 2)
        return self.attend_heads(layer, query, dropout).transpose(1, 2).reshape(rows, length, width)

    def attend_heads(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        """Attend from queries (B, H, N, D / H), N for each context -> (B, H, N, D / H)."""
        kv = self.kv[layer]
        key, value = kv.unbind(2) if kv.dim() == 5 else parts_of(kv, self.heads, 2)
        mask = None if self.keep is None else self.keep[:, None, None, :]
        return attention(query, key, value, mask, dropout)


@dataclass(eq=False, repr=False)
class Joined(Context):
    """A context in training on a GPU, projected for all layers by one product: few large operations instead of many.

    `kv` holds keys and values of each layer, 2 L x (B, P, D): views of `whole`.
    """

    whole: Tensor | None = None
    """(B, P, L * 2 D)."""

    def __getitem__(self, index: Tensor) -> Context:
        whole = self.whole.index_select(0, index)
        keep = None if self.keep is None else self.keep[index]
        return replace(self, kv=list(whole.chunk(len(self.kv), -1)), keep=keep, whole=whole)

    def attend_heads(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        pair = self.kv[2 * layer : 2 * layer + 2]
        key, value = (heads_of(part, self.heads) for part in pair)
        mask = None if self.keep is None else self.keep[:, None, None, :]
        return attention(query, key, value, mask, dropout)


@dataclass(eq=False, repr=False)
class Absorbed(Context):
    """A context for few queries: `kv` holds its unprojected states (B, P, V), and these transposed.

    A score q (W x) is (W' q) x, and a mean of values is the value of a mean, so the key and value matrices are applied
    to queries and results instead. Equal to the projected form, and cheaper below about D / H queries for a context.
    """

    maps: Sequence[Linear] = ()
    """Key and value matrices of each cross-attention."""

    def attend_heads(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        (states, transposed), (batch, heads, count, size) = self.kv, query.shape
        key, value = self.maps[layer].weight.view(2, heads, size, -1)
        # The keys' bias adds the same to all scores of a query.
        bias = self.maps[layer].bias.view(2, heads, 1, size)[1]
        query = (query * size**-0.5).transpose(0, 1).reshape(heads, batch * count, size) @ key
        query = query.view(heads, batch, count, -1).transpose(0, 1).reshape(batch, heads * count, -1)
        scores = query @ transposed
        if self.keep is not None:
            scores = scores.masked_fill(~self.keep[:, None], float("-inf"))
        seen = F.dropout(scores.softmax(-1), dropout, dropout > 0) @ states
        seen = seen.view(batch, heads, count, -1).transpose(0, 1).reshape(heads, batch * count, -1)
        out = (seen @ value.transpose(1, 2)).view(heads, batch, count, size).transpose(0, 1)
        return out + bias


def project(
    maps: Sequence[Linear], states: Tensor, heads: int, keep: Tensor | None = None, queries: int | None = None
) -> Context:
    """Project states (B, P, V) by each layer's key and value matrices; the rest as in `Stack.context`."""
    if torch.is_grad_enabled() and states.device.type != "cpu" and not any(kv._forward_pre_hooks for kv in maps):
        return _project_at_once(maps, states, heads, keep)
    if torch.is_grad_enabled() or states.device.type != "cpu":
        return Context([kv(states) for kv in maps], heads, keep)
    few = queries is not None and queries <= maps[0].out_features // 2 // heads
    if few and not torch.is_autocast_enabled("cpu"):  # which would convert the matrices again at every use
        transposed = states.transpose(1, 2)
        # In bfloat16 a product with a matrix that is only seen as transposed waits for memory, 3 times as long.
        transposed = transposed.contiguous() if plain_is_faster(states) else transposed
        return Absorbed([states, transposed], heads, keep, maps=maps)
    # Grouped by head, few queries read them several times as fast, as in decoding.
    return Context([by_head(kv(states), heads).contiguous() for kv in maps], heads, keep)


def _project_at_once(maps: Sequence[Linear], states: Tensor, heads: int, keep: Tensor | None) -> Joined:
    whole = F.linear(states, torch.cat([kv.weight for kv in maps]), torch.cat([kv.bias for kv in maps]))
    return Joined(list(whole.chunk(2 * len(maps), -1)), heads, keep, whole=whole)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, P, D) -> (B, H, P, D / H) without a copy."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def parts_of(x: Tensor, heads: int, count: int) -> list[Tensor]:
    """(B, P, count * D) -> `count` views (B, H, P, D / H), whose gradients are put together by one copy."""
    return [part.transpose(1, 2) for part in x.view(*x.shape[:2], count, heads, -1).unbind(2)]


def by_head(x: Tensor, heads: int, parts: int = 2) -> Tensor:
    """(B, P, parts * D) -> (B, H, parts, P, D / H) without a copy; unchanged if it is grouped by head already."""
    return x if x.dim() == 5 else x.view(*x.shape[:2], parts, heads, -1).permute(0, 3, 2, 1, 4)
