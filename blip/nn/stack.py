"""The transformer stack: blocks are built from given parts, and a mask belongs to a pass, not to weights.

A pass is one self-attention over one or more segments (words, patches, queries, ...), which may be causal and may see
the keys of another pass or of a cache. Several passes go through a stack side by side: weights that they share are
applied to all their tokens at once.

R rows, T tokens of a row, N packed tokens, B contexts, P context tokens, D width, V context width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.nn.attention import attention, prepared
from blip.nn.context import Context, by_head, heads_of, parts_of, project
from blip.nn.linear import Linear, linear
from blip.nn.packing import Layout, first_tokens, join, split
from blip.nn.settings import TextConfig, TrainingOptions


@dataclass(eq=False, repr=False)
class Segment:
    """Tokens of one kind in a pass."""

    states: Tensor
    """(N, D), packed."""
    layout: Layout
    context: Context | Sequence[Context] | None = None
    """Contexts of the cross-attentions, which define how many they take."""
    feed_forward: str = ""
    """Name of the feed-forward for these tokens."""


@dataclass(eq=False, repr=False)
class Pass:
    """One use of a stack: segments that attend to each other, and the limits of that."""

    segments: Sequence[Segment]
    attention: str
    """Name of the self-attention."""
    causal: bool = False
    """Whether a token of the only segment sees just itself and those before it."""
    after: Pass | Cache | None = None
    """Further tokens to see: an earlier pass of the same run with as many rows and the same self-attention, or a cache,
    to which this pass is added."""
    sees: Tensor | None = None
    """(R, T, P + T) bool, True where a token sees one of the P tokens of `after` or of its own; None: all."""
    first: bool = False
    """Whether to return only the state of the first token of the only segment."""

    def __post_init__(self) -> None:
        if (self.causal or self.first) and (len(self.segments) > 1 or (self.causal and self.first)):
            raise ValueError("a pass with `causal` or `first` must have one segment, and not both options")

    @property
    def triangular(self) -> bool:
        """Whether `causal` is the only limit, as padding comes after the tokens."""
        return self.causal and self.after is None

    @cached_property
    def mask(self) -> Tensor | None:
        """(R or 1, 1, T or 1, P + T), as `attention` takes it; None: all is seen, or as `triangular` says."""
        mask = self._mask()
        return mask if mask is None else prepared(mask, self.segments[0].states)

    def _mask(self) -> Tensor | None:
        """The same in bool, True where a token is seen."""
        if self.sees is not None:
            return self.sees[:, None]
        if self.triangular:
            return None
        length, device = _length(self.segments), self.segments[0].states.device
        own = _padding_mask(self.segments)
        if self.causal:
            own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if not isinstance(self.after, Pass):
            return own
        before = self.after.segments
        return _beside((_padding_mask(before), own), (_length(before), length), self.segments[0].layout.rows, length)


def _length(segments: Sequence[Segment]) -> int:
    return sum(one.layout.length for one in segments)


def _padding_mask(segments: Sequence[Segment]) -> Tensor | None:
    """(R, 1, 1, T) bool, False at padding of the segments; None: no padding."""
    layouts = [one.layout for one in segments]
    if len(layouts) == 1:
        return layouts[0].mask
    return _beside([one.mask for one in layouts], [one.length for one in layouts], layouts[0].rows, 1)


def _beside(masks: Sequence[Tensor | None], lengths: Sequence[int], rows: int, queries: int) -> Tensor | None:
    """Concatenate masks of neighbouring tokens -> (R, 1, queries, sum of lengths); None: all tokens are seen."""
    known = [mask for mask in masks if mask is not None]
    if not known:
        return None
    everything = torch.ones((), dtype=torch.bool, device=known[0].device)
    parts = zip(masks, lengths, strict=True)
    return torch.cat([(everything if m is None else m).expand(rows, 1, queries, n) for m, n in parts], 3)


class Cache:
    """Key-value cache of self-attentions for R rows of at most `slots` tokens, filled in place."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.filled = 0
        self.kv: list[Tensor] = []  # of each block (R, H, 2, slots, D / H)

    def add(self, layer: int, kv: Tensor) -> Tensor:
        """Add T tokens (R, H, 2, T, D / H) to a layer -> all of its tokens (R, H, 2, filled + T, D / H)."""
        if layer == len(self.kv):
            self.kv.append(kv.new_empty(*kv.shape[:3], self.slots, kv.shape[4]))
        end = self.filled + kv.shape[3]
        self.kv[layer][..., self.filled : end, :] = kv
        return self.kv[layer][..., :end, :]

    def take(self, index: Tensor) -> None:
        """Keep only the rows at `index`."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv.new_empty(len(index), *kv.shape[1:])
            self.kv[layer][..., : self.filled, :] = kv[..., : self.filled, :].index_select(0, index)


_Seen = dict[Pass, tuple[Tensor, ...]]
"""Passes that other passes see -> their keys and values in the current layer."""


class SelfAttention(nn.Module):
    """Multi-head self-attention among the tokens of a pass."""

    def __init__(self, config: TextConfig, options: TrainingOptions) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, options.attention_dropout
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, passes: Sequence[Pass], layer: int, first: bool, seen: _Seen) -> Tensor:
        """Joined segments of the passes (N, D) -> (N, D), or (rows, D) for the first tokens only."""
        layouts = [segment.layout for one in passes for segment in one.segments]
        if first:
            width, weight, bias = self.out.in_features, self.qkv.weight, self.qkv.bias
            queries = linear(first_tokens(x, layouts), weight[:width], bias[:width])
            firsts = iter(queries.split([layout.rows for layout in layouts]))
            parts = iter(split(linear(x, weight[width:], bias[width:]), layouts))
        else:
            parts = iter(split(self.qkv(x), layouts))
        dropout, outs = self.dropout if self.training else 0.0, []
        for one in passes:
            grid, count = _beside_each_other(parts, one.segments), 2 if first else 3
            if isinstance(one.after, Cache):
                grid = by_head(grid, self.heads, count)
                query, (key, value) = grid[:, :, 0], one.after.add(layer, grid[:, :, -2:]).unbind(2)
            else:
                query, key, value = [None, *parts_of(grid, self.heads, count)][-3:]
            if first:
                query = heads_of(next(firsts)[:, None], self.heads)
            if isinstance(one.after, Pass):
                key, value = (torch.cat(pair, 2) for pair in zip(seen[one.after], (key, value), strict=True))
            if one in seen:
                seen[one] = key, value
            out = attention(query, key, value, one.mask, dropout, one.triangular)
            out = out.transpose(1, 2).reshape(len(out), -1, self.out.in_features)
            outs += [out[:, 0]] if first else _apart(out, one.segments)
        return self.out(join(outs))


def _beside_each_other(parts: Iterator[Tensor], segments: Sequence[Segment]) -> Tensor:
    """Unpack the next parts (N, D) as the segments of a pass, side by side (R, T, D)."""
    grids = [one.layout.unpack(next(parts)) for one in segments]
    return grids[0] if len(grids) == 1 else torch.cat(grids, 1)


def _apart(grid: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Undo `_beside_each_other`."""
    if len(segments) == 1:
        return [segments[0].layout.pack(grid)]
    parts = grid.split([one.layout.length for one in segments], 1)
    return [one.layout.pack(part) for one, part in zip(segments, parts, strict=True)]


class CrossAttention(nn.Module):
    """Multi-head attention of packed tokens to a `Context`."""

    def __init__(self, config: TextConfig, options: TrainingOptions, context_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, options.attention_dropout
        self.query = Linear(config.width, config.width)
        self.kv = Linear(context_width, 2 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, layouts: Sequence[Layout], contexts: Sequence[Context], layer: int) -> Tensor:
        """Tokens of some layouts, joined (N, D), each layout with its context -> (N, D)."""
        dropout = self.dropout if self.training else 0.0
        queries = split(self.query(x), layouts)
        outs = [
            layout.pack(context.attend(layer, layout.unpack(query), dropout))
            for layout, context, query in zip(layouts, contexts, queries, strict=True)
        ]
        return self.out(join(outs))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; each with dropout, residual, then normalisation, as in BERT.

    It has one or more self-attentions by name, at most one cross-attention (a `CrossAttention`, or a module with
    the same interface), and one or more feed-forwards by name, the usual one being "".
    """

    def __init__(
        self,
        config: TextConfig,
        options: TrainingOptions,
        attentions: Sequence[str],
        cross: nn.Module | None = None,
        feed_forwards: Sequence[str] = ("",),
    ) -> None:
        super().__init__()
        for name in attentions:
            self.add_module(name, SelfAttention(config, options))
            self.add_module(f"{name}_norm", nn.LayerNorm(config.width, config.norm_eps))
        self.cross = cross
        if cross is not None:
            self.cross_norm = nn.LayerNorm(config.width, config.norm_eps)
        for name in feed_forwards:
            up, down, norm = _feed_forward(name)
            self.add_module(up, Linear(config.width, config.hidden))
            self.add_module(down, Linear(config.hidden, config.width))
            self.add_module(norm, nn.LayerNorm(config.width, config.norm_eps))
        self.dropout = nn.Dropout(options.dropout)

    def attend_self(self, group: _Group, x: Tensor, layer: int, seen: _Seen) -> Tensor:
        (name, first), parts, passes = group
        y = self._drop(getattr(self, name)(x, passes, layer, first, seen))
        if first:
            x = first_tokens(x, [part.layout for part in parts])
            for part in parts:
                part.layout = Layout(part.layout.rows, 1)
        return getattr(self, f"{name}_norm")(x + y)

    def attend_cross(self, group: _Group, x: Tensor, layer: int) -> Tensor:
        grounded, parts, _ = group
        if not grounded:
            return x
        layouts, contexts = [part.layout for part in parts], [part.segment.context for part in parts]
        return self.cross_norm(x + self._drop(self.cross(x, layouts, contexts, layer)))

    def _drop(self, x: Tensor) -> Tensor:
        # In evaluation the call of a module that does nothing would be noticeable in every decoding step.
        return self.dropout(x) if self.training else x

    def feed_forward(self, x: Tensor, name: str = "") -> Tensor:
        up, down, norm = (getattr(self, part) for part in _feed_forward(name))
        return norm(x + self._drop(down(F.gelu(up(x)))))


def _feed_forward(name: str) -> tuple[str, str, str]:
    """Names of a feed-forward's two layers and normalisation in a block."""
    start = f"{name}_" if name else ""
    return f"{start}up", f"{start}down", f"{start}ffn_norm"


class Stack(nn.ModuleList):
    """Blocks, one after another."""

    def context(self, states: Tensor, keep: Tensor | None = None, queries: int | None = None) -> Context:
        """Project states (B, P, V), with `keep` (B, P) bool False at padding, for the cross-attentions.

        `queries` is the number of tokens that will attend to each of the B, if it is known and no gradient is needed.
        """
        cross = [block.cross for block in self if block.cross is not None]
        return project([one.kv for one in cross], states, cross[0].heads, keep, queries)

    def forward(self, passes: Sequence[Pass]) -> list[list[Tensor]]:
        """Run passes side by side -> for each pass the packed states (N, D) of its segments, or (R, D) if `first`."""
        parts = [_Part(one, segment) for one in passes for segment in one.segments]
        seen: _Seen = {one.after: () for one in passes if isinstance(one.after, Pass)}
        for i, one in enumerate(passes):
            if isinstance(one.after, Pass) and one.after not in passes[:i]:
                raise ValueError("a pass can only see an earlier pass of the same run")
        by_attention = _merged(_grouped(parts, lambda part: (part.of.attention, False)), seen)
        by_attention_at_last = _merged(_grouped(parts, lambda part: (part.of.attention, part.of.first)), seen)
        by_context = _grouped(parts, lambda part: part.segment.context is not None)
        by_feed_forward = _grouped(parts, lambda part: part.segment.feed_forward)
        x, crossed = join([part.segment.states for part in parts]), 0
        for layer, block in enumerate(self):
            groups = by_attention_at_last if layer + 1 == len(self) else by_attention
            x = _each(groups, x, partial(block.attend_self, layer=layer, seen=seen))
            if block.cross is not None:
                x = _each(by_context, x, partial(block.attend_cross, layer=crossed))
                crossed += 1
            x = _each(by_feed_forward, x, lambda group, x, block=block: block.feed_forward(x, group.kind))
        states = iter(split(x, [part.layout for part in parts]))
        return [[next(states) for _ in one.segments] for one in passes]


class _Part:
    """A segment on its way through the blocks."""

    def __init__(self, of: Pass, segment: Segment) -> None:
        self.of, self.segment, self.layout = of, segment, segment.layout


class _Group(NamedTuple):
    """Neighbouring segments that go through the same weights together."""

    kind: Any
    parts: list[_Part]
    passes: list[Pass]


def _grouped(parts: Sequence[_Part], kind: Callable[[_Part], Any]) -> list[_Group]:
    groups = [(name, list(some)) for name, some in groupby(parts, kind)]
    return [_Group(name, some, list(dict.fromkeys(part.of for part in some))) for name, some in groups]


def merges(device: torch.device) -> bool:
    """Whether neighbouring passes with the same kind of self-attention and grid attend as one.

    A GPU does, as few large operations launch faster. On a CPU padding is not in a grid.
    """
    return device.type != "cpu"


def _merged(groups: Sequence[_Group], seen: _Seen) -> list[_Group]:
    """Put passes of a group that nothing else tells apart together for their self-attention."""

    def kind(one: Pass) -> Any:
        segment, layout = one.segments[0], one.segments[0].layout
        plain = len(one.segments) == 1 and one.after is None and one.sees is None and one not in seen
        if plain and layout.cells is None and merges(segment.states.device):
            return layout.length, one.causal, one.first
        return id(one)

    def merged(some: list[Pass]) -> Pass:
        if len(some) == 1:
            return some[0]
        first, layouts = some[0], [one.segments[0].layout for one in some]
        layout = Layout(sum(one.rows for one in layouts), layouts[0].length)
        if any(one.mask is not None for one in layouts):
            everything = torch.ones(1, dtype=torch.bool, device=first.segments[0].states.device)
            masks = [everything if one.mask is None else one.mask for one in layouts]
            shapes = [(one.rows, 1, 1, one.length) for one in layouts]
            layout.mask = torch.cat([mask.expand(shape) for mask, shape in zip(masks, shapes, strict=True)])
        return Pass([Segment(first.segments[0].states, layout)], first.attention, first.causal, first=first.first)

    return [
        group
        if len(group.passes) == 1
        else group._replace(passes=[merged(list(some)) for _, some in groupby(group.passes, kind)])
        for group in groups
    ]


def _each(groups: Sequence[_Group], x: Tensor, through: Callable[[_Group, Tensor], Tensor]) -> Tensor:
    """Apply `through(group, tokens)` to each group's part of the joined tokens (N, D)."""
    if len(groups) == 1:
        return through(groups[0], x)
    xs = x.split([sum(part.layout.tokens for part in group.parts) for group in groups])
    return join([through(group, tokens) for group, tokens in zip(groups, xs, strict=True)])
