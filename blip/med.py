"""MED, the text transformer used three ways (paper, section 3.1): text encoder, image-grounded encoder and decoder.

A block owns two self-attentions (bidirectional, causal), one cross-attention and one feed-forward, so what the three
uses share is shared by structure. Several uses can go through the blocks side by side (`Pass`), and a context is
projected to keys and values once (`Context`), whatever looks at it afterwards.

B images, R rows of text, T text tokens, N packed tokens, P context tokens, D width, V context width, H heads, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.attention import attention
from blip.config import TextConfig
from blip.linear import Linear, linear


class _Unpack(torch.autograd.Function):
    """Packed (N, D) -> grid (R*T, D). What stands at padding is arbitrary; both directions are plain gathers."""

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
    """Where the tokens of R texts stand in a grid of R x T cells, and the way between grid and packed tokens.

    On a CPU padding is left out of every linear layer: N is the number of real tokens. Elsewhere N = R * T, because
    asking how many tokens are real would make the device wait for the host. The results are the same.
    """

    def __init__(self, keep: Tensor) -> None:
        self.rows, self.length = keep.shape
        self.keep = keep
        packed = keep.device.type == "cpu" and not bool(keep.all())
        self.mask = None if keep.device.type == "cpu" and not packed else keep[:, None, None, :]
        self.cells: Tensor | None = None
        if packed:
            self.cells = keep.flatten().nonzero().squeeze(1)
            self.source = (keep.flatten().cumsum(0) - 1).clamp_(min=0)

    def pack(self, grid: Tensor) -> Tensor:
        """(R, T, D) -> (N, D)."""
        flat = grid.reshape(self.rows * self.length, -1)
        return flat if self.cells is None else _Pack.apply(flat, self.cells)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, D) -> (R, T, D); what stands at padding is arbitrary."""
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


class Context:
    """What texts look at (image tokens, question states, ...), projected to keys and values once per layer.

    `fan` rows of text look at each of the B contexts; the rows of one context are neighbours.
    """

    def __init__(self, projected: list[Tensor], heads: int, keep: Tensor | None = None, fan: int = 1) -> None:
        self.projected = projected  # L x (B, P, 2 D): keys, then values
        self.heads = heads
        self.keep = keep  # (B, P) bool, None where every token counts
        self.fan = fan

    def __len__(self) -> int:
        return len(self.projected[0])

    def __getitem__(self, index: Tensor) -> Context:
        """The contexts at `index` (M,), for M x fan rows."""
        keep = None if self.keep is None else self.keep[index]
        return Context([kv.index_select(0, index) for kv in self.projected], self.heads, keep, self.fan)

    def expand(self, fan: int) -> Context:
        """The same contexts, each for `fan` neighbouring rows of text; nothing is copied."""
        return Context(self.projected, self.heads, self.keep, self.fan * fan)

    def attend(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        """Queries (B * fan, T, D) -> (B * fan, T, D)."""
        kv = self.projected[layer]
        rows, length, width = query.shape
        if rows != len(kv) * self.fan:
            raise ValueError(f"{rows} texts look at {len(kv)} contexts with {self.fan} texts each")
        query = query.reshape(len(kv), self.fan * length, self.heads, -1).transpose(1, 2)
        key, value = kv.view(len(kv), kv.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if self.keep is None else self.keep[:, None, None, :]
        out = attention(query, key, value, mask, dropout)
        return out.transpose(1, 2).reshape(rows, length, width)


@dataclass
class Pass:
    """One use of the transformer: R texts, how they attend to themselves and what they look at."""

    ids: Tensor
    """(R, T) int64."""
    keep: Tensor
    """(R, T) bool; kept tokens are a prefix of every row and there is at least one."""
    causal: bool = False
    """Decoder (each token sees those before it) instead of encoder."""
    context: Context | None = None
    """What the texts look at."""
    first: bool = False
    """Only the first token's state is wanted."""

    def __post_init__(self) -> None:
        self.layout = Layout(self.keep)


class Cache:
    """Keys and values of the tokens that a decoder has already read: (R, length, 2 D) per layer, written in place."""

    def __init__(self, config: TextConfig, rows: int, length: int, like: Tensor) -> None:
        self.filled = 0
        self.kv = [like.new_zeros(rows, length, 2 * config.width) for _ in range(config.layers)]


def _split(qkv: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(R, T, parts * D) -> parts x (R, H, T, D / H)."""
    return qkv.view(*qkv.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class SelfAttention(nn.Module):
    """Multi-head attention of texts to themselves, over packed tokens."""

    def __init__(self, config: TextConfig, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = config.heads, causal, config.attention_dropout
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, layouts: Sequence[Layout], first: bool) -> Tensor:
        """(N, D) -> (N, D), or (rows, D) for the first tokens only."""
        if first:
            return self._first(x, layouts)
        dropout = self.dropout if self.training else 0.0
        outs = []
        for layout, qkv in zip(layouts, _per_layout(self.qkv(x), layouts), strict=True):
            query, key, value = _split(layout.unpack(qkv), 3, self.heads)
            # A causal row needs no padding mask: kept tokens come before the padding.
            mask = None if self.causal else layout.mask
            out = attention(query, key, value, mask, dropout, self.causal)
            outs.append(layout.pack(out.transpose(1, 2).reshape(layout.rows, layout.length, -1)))
        return self.out(_join(outs))

    def _first(self, x: Tensor, layouts: Sequence[Layout]) -> Tensor:
        width = x.shape[1]
        weight, bias = self.qkv.weight, self.qkv.bias
        firsts = _join([layout.first(part) for layout, part in zip(layouts, _per_layout(x, layouts), strict=True)])
        queries = linear(firsts, weight[:width], bias[:width]).split([layout.rows for layout in layouts])
        keys_values = _per_layout(linear(x, weight[width:], bias[width:]), layouts)
        dropout = self.dropout if self.training else 0.0
        outs = []
        for layout, query, kv in zip(layouts, queries, keys_values, strict=True):
            key, value = _split(layout.unpack(kv), 2, self.heads)
            (query,) = _split(query[:, None], 1, self.heads)
            out = attention(query, key, value, layout.mask, dropout)
            outs.append(out.reshape(layout.rows, width))
        return self.out(_join(outs))

    def step(self, x: Tensor, past: Tensor, filled: int) -> Tensor:
        """Next tokens (R, D) after `filled` cached ones -> (R, D); `past` (R, length, 2 D) is written at `filled`."""
        width = x.shape[1]
        query, kv = self.qkv(x).split([width, 2 * width], dim=1)
        past[:, filled] = kv
        key, value = _split(past[:, : filled + 1], 2, self.heads)
        (query,) = _split(query[:, None], 1, self.heads)
        return self.out(attention(query, key, value).reshape(len(x), width))


class CrossAttention(nn.Module):
    """Multi-head attention of packed text tokens to a `Context`."""

    def __init__(self, config: TextConfig, context_width: int) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.query = Linear(config.width, config.width)
        self.kv = Linear(context_width, 2 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, layouts: Sequence[Layout], contexts: Sequence[Context], layer: int) -> Tensor:
        """(N, D) -> (N, D)."""
        dropout = self.dropout if self.training else 0.0
        queries = _per_layout(self.query(x), layouts)
        outs = [
            layout.pack(context.attend(layer, layout.unpack(query), dropout))
            for layout, context, query in zip(layouts, contexts, queries, strict=True)
        ]
        return self.out(_join(outs))


class Block(nn.Module):
    """Self-attention (one of two), cross-attention, feed-forward; each with dropout, residual, then normalisation."""

    def __init__(self, config: TextConfig, context_width: int | None) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.text = SelfAttention(config, causal=False)
        self.text_norm = nn.LayerNorm(width, eps)
        if context_width is not None:
            self.causal = SelfAttention(config, causal=True)
            self.causal_norm = nn.LayerNorm(width, eps)
            self.cross = CrossAttention(config, context_width)
            self.cross_norm = nn.LayerNorm(width, eps)
        self.up = Linear(width, config.hidden)
        self.down = Linear(config.hidden, width)
        self.ffn_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(config.dropout)

    def attend_self(self, x: Tensor, layouts: Sequence[Layout], causal: bool, first: bool) -> Tensor:
        own, norm = (self.causal, self.causal_norm) if causal else (self.text, self.text_norm)
        y = self.dropout(own(x, layouts, first))
        if first:
            x = _join([layout.first(part) for layout, part in zip(layouts, _per_layout(x, layouts), strict=True)])
        return norm(x + y)

    def attend_cross(self, x: Tensor, layouts: Sequence[Layout], contexts: Sequence[Context], layer: int) -> Tensor:
        return self.cross_norm(x + self.dropout(self.cross(x, layouts, contexts, layer)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Med(nn.Module):
    """The text transformer; with `context_width=None` only its text encoder (the momentum teacher's text tower)."""

    def __init__(self, config: TextConfig, context_width: int | None) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, context_width) for _ in range(config.layers))
        if context_width is not None:
            self.head_dense = Linear(config.width, config.width)
            self.head_norm = nn.LayerNorm(config.width, config.norm_eps)
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def context(self, states: Tensor, keep: Tensor | None = None) -> Context:
        """States (B, P, V), with `keep` (B, P) bool where some are padding -> their keys and values in every layer."""
        return Context([block.cross.kv(states) for block in self.blocks], self.config.heads, keep)

    def forward(self, passes: Sequence[Pass]) -> list[Tensor]:
        """Run several passes side by side, each layer's shared weights once over all their tokens.

        Encoder passes come before decoder passes; all encoder passes agree on `first`; either all passes have a
        context or none. Returns for each pass the packed states (N, D) that its `layout` unpacks, or (R, D) if `first`.
        """
        encoders, decoders, first = self._checked(passes)
        layouts = [p.layout for p in passes]
        contexts = [p.context for p in passes if p.context is not None]
        x = _join([p.layout.pack_ids(p.ids) for p in passes])
        x = self._embed(x, _join([p.layout.pack_ids(self._positions(p.ids)) for p in passes]))
        for i, block in enumerate(self.blocks):
            trim = first and i == len(self.blocks) - 1
            parts = x.split([_count(layouts[:encoders]), _count(layouts[encoders:])])
            after = []
            if encoders:
                after.append(block.attend_self(parts[0], layouts[:encoders], causal=False, first=trim))
            if decoders:
                after.append(block.attend_self(parts[1], layouts[encoders:], causal=True, first=False))
            if trim:
                one = [Layout(layout.keep[:, :1]) for layout in layouts[:encoders]]
                layouts = one + layouts[encoders:]
            x = _join(after)
            if contexts:
                x = block.attend_cross(x, layouts, contexts, i)
            x = block.feed_forward(x)
        return list(_per_layout(x, layouts))

    def _checked(self, passes: Sequence[Pass]) -> tuple[int, int, bool]:
        kinds = [p.causal for p in passes]
        if kinds != sorted(kinds):
            raise ValueError("encoder passes must come before decoder passes")
        if any(p.first for p in passes if p.causal) or len({p.first for p in passes if not p.causal}) > 1:
            raise ValueError("`first` must be the same for all encoder passes and is not for decoder passes")
        if len({p.context is None for p in passes}) > 1:
            raise ValueError("passes with and without a context cannot run side by side")
        longest = max(p.ids.shape[1] for p in passes)
        if longest > self.config.max_positions:
            raise ValueError(f"a text of {longest} tokens exceeds the model's {self.config.max_positions} positions")
        decoders = sum(kinds)
        return len(passes) - decoders, decoders, any(p.first for p in passes)

    def _positions(self, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.norm(self.word(ids) + self.position(positions)))

    def vocabulary(self, states: Tensor) -> Tensor:
        """States (..., D) -> logits (..., vocabulary); the word embedding is the last layer's weight."""
        states = self.head_norm(F.gelu(self.head_dense(states)))
        return linear(states, self.word.weight, self.head_bias)

    def step(self, ids: Tensor, cache: Cache, context: Context) -> Tensor:
        """Read the next token of each row, ids (R,), after those in the cache (which grows by one) -> states (R, D)."""
        at = cache.filled
        x = self._embed(ids, torch.full_like(ids, at))
        layout = [Layout(torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device))]
        for i, block in enumerate(self.blocks):
            x = block.causal_norm(x + block.causal.step(x, cache.kv[i], at))
            x = block.feed_forward(block.attend_cross(x, layout, [context], i))
        cache.filled = at + 1
        return x


def _count(layouts: Sequence[Layout]) -> int:
    return sum(_tokens(layout) for layout in layouts)


def _tokens(layout: Layout) -> int:
    return layout.rows * layout.length if layout.cells is None else len(layout.cells)


def _per_layout(x: Tensor, layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
    return (x,) if len(layouts) == 1 else x.split([_tokens(layout) for layout in layouts])


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
