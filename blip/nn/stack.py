"""MED, the text transformer used three ways (paper, section 3.1): text encoder, image-grounded encoder and decoder.

A block owns two self-attentions (bidirectional, causal), one cross-attention and one feed-forward, so what the three
uses share is shared by structure. Several uses can go through the blocks side by side (`Pass`), and a context is
projected to keys and values once (`Context`), whatever looks at it afterwards.

B images, R rows of text, T text tokens, N packed tokens, P context tokens, D width, V context width, H heads, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.nn.attention import attention, plain_is_faster
from blip.nn.linear import Linear, linear
from blip.nn.settings import TextConfig


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


@dataclass(eq=False, repr=False)
class Context:
    """What texts look at (image tokens, question states, ...), projected to keys and values once per layer.

    `fan` rows of text look at each of the B contexts; the rows of one context are neighbours.
    """

    held: list[Tensor]
    """L x (B, P, 2 D), keys, then values; or, head by head, L x (B, H, 2, P, D / H)."""
    heads: int
    """H."""
    keep: Tensor | None = None
    """(B, P) bool, None where every token counts."""
    fan: int = 1
    """Rows of text for each context."""

    def __len__(self) -> int:
        return len(self.held[0])

    def __getitem__(self, index: Tensor) -> Context:
        """The contexts at `index` (M,), for M x fan rows."""
        keep = None if self.keep is None else self.keep[index]
        return replace(self, held=[part.index_select(0, index) for part in self.held], keep=keep)

    def expand(self, fan: int) -> Context:
        """The same contexts, each for `fan` neighbouring rows of text; nothing is copied."""
        return replace(self, fan=self.fan * fan)

    def attend(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        """Queries (B * fan, T, D) -> (B * fan, T, D)."""
        rows, length, width = query.shape
        if rows != len(self) * self.fan:
            raise ValueError(f"{rows} texts look at {len(self)} contexts with {self.fan} texts each")
        query = query.reshape(len(self), self.fan * length, self.heads, -1).transpose(1, 2)
        return self._look(layer, query, dropout).transpose(1, 2).reshape(rows, length, width)

    def _look(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        """Queries (B, H, N, D / H), N of them at each context -> (B, H, N, D / H)."""
        key, value = _by_head(self.held[layer], self.heads).unbind(2)
        mask = None if self.keep is None else self.keep[:, None, None, :]
        return attention(query, key, value, mask, dropout)


@dataclass(eq=False, repr=False)
class Absorbed(Context):
    """A context that few queries look at: `held` is its states (B, P, V), and these transposed.

    A score q (W x) is (W' q) x, and a mean of values is the value of a mean, so the key and value matrices are applied
    to queries and results instead. Equal to the projected form, and cheaper below about D / H queries for a context.
    """

    kv: Sequence[Linear] = ()
    """Of each layer."""

    def _look(self, layer: int, query: Tensor, dropout: float) -> Tensor:
        (states, transposed), (batch, heads, count, size) = self.held, query.shape
        key, value = self.kv[layer].weight.view(2, heads, size, -1)
        # The keys' bias adds the same to all scores of a query.
        bias = self.kv[layer].bias.view(2, heads, 1, size)[1]
        query = (query * size**-0.5).transpose(0, 1).reshape(heads, batch * count, size) @ key
        query = query.view(heads, batch, count, -1).transpose(0, 1).reshape(batch, heads * count, -1)
        scores = query @ transposed
        if self.keep is not None:
            scores = scores.masked_fill(~self.keep[:, None], float("-inf"))
        seen = F.dropout(scores.softmax(-1), dropout, dropout > 0) @ states
        seen = seen.view(batch, heads, count, -1).transpose(0, 1).reshape(heads, batch * count, -1)
        out = (seen @ value.transpose(1, 2)).view(heads, batch, count, size).transpose(0, 1)
        return out + bias


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
    """Keys and values of what a decoder has read of R texts, `slots` tokens at most, filled in place."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.filled = 0
        self.kv: list[Tensor] = []  # L x (R, H, 2, slots, D / H)

    def add(self, layer: int, kv: Tensor) -> Tensor:
        """Put in those of T more tokens (R, H, 2, T, D / H) -> all of them (R, H, 2, filled + T, D / H)."""
        if layer == len(self.kv):
            self.kv.append(kv.new_empty(*kv.shape[:3], self.slots, kv.shape[4]))
        end = self.filled + kv.shape[3]
        self.kv[layer][..., self.filled : end, :] = kv
        return self.kv[layer][..., :end, :]

    def take(self, index: Tensor) -> None:
        """Go on with the texts at `index` only."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv.new_empty(len(index), *kv.shape[1:])
            self.kv[layer][..., : self.filled, :] = kv[..., : self.filled, :].index_select(0, index)


def _by_head(kv: Tensor, heads: int) -> Tensor:
    """(B, P, 2 D) -> (B, H, 2, P, D / H) without copying; what is laid out so already stays."""
    return kv if kv.dim() == 5 else kv.view(*kv.shape[:2], 2, heads, -1).permute(0, 3, 2, 1, 4)


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

    def step(self, x: Tensor, sees: Tensor | None, cache: Cache, layer: int) -> Tensor:
        """Further tokens (R, T, D) -> (R, T, D), which go into the cache."""
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(0, 3, 2, 1, 4)
        key, value = cache.add(layer, qkv[:, :, 1:]).unbind(2)
        out = attention(qkv[:, :, 0], key, value, None if sees is None else sees[:, None])
        return self.out(out.transpose(1, 2).reshape(rows, length, width))


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

    def step(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        return self.out(context.attend(layer, self.query(x), 0.0))


class Block(nn.Module):
    """Self-attention (one of two), cross-attention, feed-forward; each with dropout, residual, then normalisation."""

    def __init__(
        self, config: TextConfig, context_width: int | None, encodes: bool = True, writes: bool = True
    ) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        if encodes:
            self.text = SelfAttention(config, causal=False)
            self.text_norm = nn.LayerNorm(width, eps)
        if context_width is not None and writes:
            self.causal = SelfAttention(config, causal=True)
            self.causal_norm = nn.LayerNorm(width, eps)
        if context_width is not None:
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
    """The text transformer; with `context_width=None` only its text encoder (the momentum teacher's text tower).

    Task models have stacks that only encode or only write: without the other's self-attention, and without the head.
    """

    def __init__(
        self, config: TextConfig, context_width: int | None, encodes: bool = True, writes: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, context_width, encodes, writes) for _ in range(config.layers))
        if context_width is not None and writes:
            self.head_dense = Linear(config.width, config.width)
            self.head_norm = nn.LayerNorm(config.width, config.norm_eps)
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """First weights of one module, as BERT's."""
        if isinstance(module, (Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def context(self, states: Tensor, keep: Tensor | None = None, queries: int | None = None) -> Context:
        """States (B, P, V), with `keep` (B, P) bool where some are padding -> what texts look at, in every layer.

        `queries` is how many text tokens will look at each of the B, where that is known and no gradient is wanted.
        """
        return project([block.cross.kv for block in self.blocks], states, self.config.heads, keep, queries)

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

    def read(self, ids: Tensor, positions: Tensor, sees: Tensor | None, cache: Cache, context: Context) -> Tensor:
        """Read T more tokens of each text, ids and positions (R, T), after those in the cache -> states (R, T, D).

        Token t sees what `sees[:, t]` (R, T, cached + T) says of the cached and then the new tokens; None: all of them.
        Nothing is dropped out, whatever the mode.
        """
        x = self.norm(self.word(ids) + self.position(positions))
        for i, block in enumerate(self.blocks):
            x = block.causal_norm(x + block.causal.step(x, sees, cache, i))
            x = block.cross_norm(x + block.cross.step(x, context, i))
            x = block.ffn_norm(x + block.down(F.gelu(block.up(x))))
        cache.filled += ids.shape[1]
        return x


def project(
    maps: Sequence[Linear], states: Tensor, heads: int, keep: Tensor | None = None, queries: int | None = None
) -> Context:
    """States (B, P, V) through each layer's key and value matrices -> a context; the rest as in `Med.context`."""
    if torch.is_grad_enabled() or states.device.type != "cpu":
        return Context([kv(states) for kv in maps], heads, keep)
    few = queries is not None and queries <= maps[0].out_features // 2 // heads
    if few and not torch.is_autocast_enabled("cpu"):  # which would convert the matrices again at every look
        transposed = states.transpose(1, 2)
        # In bfloat16 a product with a matrix that is only seen as transposed waits for memory, 3 times as long.
        transposed = transposed.contiguous() if plain_is_faster(states) else transposed
        return Absorbed([states, transposed], heads, keep, kv=maps)
    # Laid out head by head they are read several times as fast by few queries, as when a text is written.
    return Context([_by_head(kv(states), heads).contiguous() for kv in maps], heads, keep)


def _count(layouts: Sequence[Layout]) -> int:
    return sum(_tokens(layout) for layout in layouts)


def _tokens(layout: Layout) -> int:
    return layout.rows * layout.length if layout.cells is None else len(layout.cells)


def _per_layout(x: Tensor, layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
    return (x,) if len(layouts) == 1 else x.split([_tokens(layout) for layout in layouts])


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
