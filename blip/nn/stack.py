"""One transformer for all that attend: blocks are handed their parts, and a mask belongs to a pass, not to weights.

A pass is one self-attention over one or more segments (words, patches, queries, ...), which may be causal and may see
the keys of another pass or of a cache. Several passes go through a stack side by side: what they share is applied to
all their tokens at once.

R rows, T tokens of a row, N packed tokens, B contexts, P context tokens, D width, V context width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.nn.attention import attention
from blip.nn.context import Context, project
from blip.nn.linear import Linear, linear
from blip.nn.packing import Layout, first_tokens, join, split
from blip.nn.settings import TextConfig


@dataclass(eq=False, repr=False)
class Segment:
    """Tokens of one kind in a pass."""

    states: Tensor
    """(N, D), packed."""
    layout: Layout
    context: Context | Sequence[Context] | None = None
    """What they attend to in the cross-attentions, which say how many contexts they take."""
    feed_forward: str = ""
    """Name of the feed-forward that they go through."""


@dataclass(eq=False, repr=False)
class Pass:
    """One use of a stack: segments that attend to each other, and what limits that."""

    segments: Sequence[Segment]
    attention: str
    """Name of the self-attention."""
    causal: bool = False
    """Each token of the only segment sees those before it alone."""
    after: Pass | Cache | None = None
    """What is seen besides: an earlier pass of the same run, rows and self-attention, or all that a cache holds, to
    which this pass is added."""
    sees: Tensor | None = None
    """(R, T, P + T) bool, which of P tokens of `after` and of its own each token sees, if not all."""
    first: bool = False
    """Only the state of the first token of the only segment is wanted."""

    def __post_init__(self) -> None:
        if (self.causal or self.first) and (len(self.segments) > 1 or (self.causal and self.first)):
            raise ValueError("a pass that is causal, or of which only the first token is wanted, has one segment")

    @property
    def triangular(self) -> bool:
        """Whether `causal` is all that limits it: kept tokens come before the padding."""
        return self.causal and self.after is None

    @cached_property
    def mask(self) -> Tensor | None:
        """(R or 1, 1, T or 1, P + T) bool, True where a token is seen; None: everywhere, or as `triangular` says."""
        if self.sees is not None:
            return self.sees[:, None]
        if self.triangular:
            return None
        length, device = _length(self.segments), self.segments[0].states.device
        own = _kept(self.segments)
        if self.causal:
            own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if not isinstance(self.after, Pass):
            return own
        before = self.after.segments
        return _beside((_kept(before), own), (_length(before), length), self.segments[0].layout.rows, length)


def _length(segments: Sequence[Segment]) -> int:
    return sum(one.layout.length for one in segments)


def _kept(segments: Sequence[Segment]) -> Tensor | None:
    """(R, 1, 1, T) bool, which tokens of the segments are no padding; None: all."""
    layouts = [one.layout for one in segments]
    if len(layouts) == 1:
        return layouts[0].mask
    return _beside([one.mask for one in layouts], [one.length for one in layouts], layouts[0].rows, 1)


def _beside(masks: Sequence[Tensor | None], lengths: Sequence[int], rows: int, queries: int) -> Tensor | None:
    """Masks of neighbouring tokens, as many as `lengths` says, as one (R, 1, queries, sum); None: all are seen."""
    known = [mask for mask in masks if mask is not None]
    if not known:
        return None
    everything = torch.ones((), dtype=torch.bool, device=known[0].device)
    parts = zip(masks, lengths, strict=True)
    return torch.cat([(everything if m is None else m).expand(rows, 1, queries, n) for m, n in parts], 3)


class Cache:
    """Keys and values of what a decoder has read of R rows, `slots` tokens at most, filled in place."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.filled = 0
        self.kv: list[Tensor] = []  # of each block (R, H, 2, slots, D / H)

    def add(self, layer: int, kv: Tensor) -> Tensor:
        """Put in those of T more tokens (R, H, 2, T, D / H) -> all of them (R, H, 2, filled + T, D / H)."""
        if layer == len(self.kv):
            self.kv.append(kv.new_empty(*kv.shape[:3], self.slots, kv.shape[4]))
        end = self.filled + kv.shape[3]
        self.kv[layer][..., self.filled : end, :] = kv
        return self.kv[layer][..., :end, :]

    def take(self, index: Tensor) -> None:
        """Go on with the rows at `index` only."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv.new_empty(len(index), *kv.shape[1:])
            self.kv[layer][..., : self.filled, :] = kv[..., : self.filled, :].index_select(0, index)


class SelfAttention(nn.Module):
    """Weights with which the tokens of a pass attend to each other."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, passes: Sequence[Pass], layer: int, first: bool) -> Tensor:
        """Segments of the passes, joined (N, D) -> (N, D), or (rows, D) for the first tokens only."""
        layouts = [segment.layout for one in passes for segment in one.segments]
        if first:
            width, weight, bias = self.out.in_features, self.qkv.weight, self.qkv.bias
            queries = linear(first_tokens(x, layouts), weight[:width], bias[:width])
            firsts = iter(queries.split([layout.rows for layout in layouts]))
            projected = linear(x, weight[width:], bias[width:])
        else:
            projected = self.qkv(x)
        grids = iter([layout.unpack(part) for layout, part in zip(layouts, split(projected, layouts), strict=True)])
        dropout, before, outs = self.dropout if self.training else 0.0, {}, []
        for one in passes:
            own = [next(grids) for _ in one.segments]
            grid = self._by_head(own[0] if len(own) == 1 else torch.cat(own, 1))
            *query, key, value = grid.unbind(2)
            query = self._by_head(next(firsts)[:, None]).squeeze(2) if first else query[0]
            if isinstance(one.after, Cache):
                key, value = one.after.add(layer, grid[:, :, 1:]).unbind(2)
            elif one.after is not None:
                key, value = (torch.cat(pair, 2) for pair in zip(before[one.after], (key, value), strict=True))
            before[one] = key, value
            out = attention(query, key, value, one.mask, dropout, one.triangular)
            out = out.transpose(1, 2).reshape(len(out), -1, self.out.in_features)
            outs += [out.flatten(0, 1)] if first else _packed(out, one.segments)
        return self.out(join(outs))

    def _by_head(self, x: Tensor) -> Tensor:
        """(R, T, parts * D) -> (R, H, parts, T, D / H)."""
        return x.view(*x.shape[:2], -1, self.heads, self.out.in_features // self.heads).permute(0, 3, 2, 1, 4)


def _packed(grid: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Segments side by side (R, T, D) -> of each (N, D)."""
    parts = (grid,) if len(segments) == 1 else grid.split([one.layout.length for one in segments], 1)
    return [one.layout.pack(part) for one, part in zip(segments, parts, strict=True)]


class CrossAttention(nn.Module):
    """Multi-head attention of packed tokens to a `Context`."""

    def __init__(self, config: TextConfig, context_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
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

    It has one or more self-attentions by name, at most one cross-attention (a `CrossAttention`, or what is called like
    one), and one or more feed-forwards by name, the usual one being "".
    """

    def __init__(
        self,
        config: TextConfig,
        attentions: Sequence[str],
        cross: nn.Module | None = None,
        feed_forwards: Sequence[str] = ("",),
    ) -> None:
        super().__init__()
        for name in attentions:
            self.add_module(name, SelfAttention(config))
            self.add_module(f"{name}_norm", nn.LayerNorm(config.width, config.norm_eps))
        self.cross = cross
        if cross is not None:
            self.cross_norm = nn.LayerNorm(config.width, config.norm_eps)
        for name in feed_forwards:
            up, down, norm = _feed_forward(name)
            self.add_module(up, Linear(config.width, config.hidden))
            self.add_module(down, Linear(config.hidden, config.width))
            self.add_module(norm, nn.LayerNorm(config.width, config.norm_eps))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, run: _Run, layer: int, crossed: int, last: bool) -> None:
        """Take passes one block further; `crossed` is how many of the `layer` blocks before have a cross-attention."""

        def attend_self(kind: tuple[str, bool], x: Tensor, at: Sequence[int]) -> Tensor:
            name, first = kind
            y = self.dropout(getattr(self, name)(x, list(dict.fromkeys(run.passes[i] for i in at)), layer, first))
            if first:
                x = first_tokens(x, [run.layouts[i] for i in at])
                for i in at:
                    run.layouts[i] = Layout(run.layouts[i].rows, 1)
            return getattr(self, f"{name}_norm")(x + y)

        def attend_cross(grounded: bool, x: Tensor, at: Sequence[int]) -> Tensor:
            if not grounded:
                return x
            contexts = [run.segments[i].context for i in at]
            return self.cross_norm(x + self.dropout(self.cross(x, [run.layouts[i] for i in at], contexts, crossed)))

        run.each([(one.attention, one.first and last) for one in run.passes], attend_self)
        if self.cross is not None:
            run.each([segment.context is not None for segment in run.segments], attend_cross)
        run.each([segment.feed_forward for segment in run.segments], lambda name, x, _: self.feed_forward(x, name))

    def feed_forward(self, x: Tensor, name: str = "") -> Tensor:
        up, down, norm = (getattr(self, part) for part in _feed_forward(name))
        return norm(x + self.dropout(down(F.gelu(up(x)))))


def _feed_forward(name: str) -> tuple[str, str, str]:
    """Names of its two layers and its normalisation in a block."""
    start = f"{name}_" if name else ""
    return f"{start}up", f"{start}down", f"{start}ffn_norm"


class Stack(nn.ModuleList):
    """Blocks, one after another."""

    def context(self, states: Tensor, keep: Tensor | None = None, queries: int | None = None) -> Context:
        """States (B, P, V), with `keep` (B, P) bool where some are padding -> what segments attend to.

        `queries` is how many tokens will attend to each of the B, where that is known and no gradient is wanted.
        """
        cross = [block.cross for block in self if block.cross is not None]
        return project([one.kv for one in cross], states, cross[0].heads, keep, queries)

    def forward(self, passes: Sequence[Pass]) -> list[list[Tensor]]:
        """Run passes side by side -> of each pass the packed states (N, D) of its segments, or (R, D) if `first`."""
        run, crossed = _Run(passes), 0
        for layer, block in enumerate(self):
            block(run, layer, crossed, last=layer == len(self) - 1)
            crossed += block.cross is not None
        parts = iter(split(run.x, run.layouts))
        return [[next(parts) for _ in one.segments] for one in passes]


class _Run:
    """Passes on their way through the blocks."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.segments = [segment for one in passes for segment in one.segments]
        self.passes = [one for one in passes for _ in one.segments]
        """Of each segment."""
        self.layouts = [segment.layout for segment in self.segments]
        """Of each segment by now."""
        self.x = join([segment.states for segment in self.segments])
        """(N, D), the segments' tokens one behind another."""

    def each(self, kinds: Sequence[Hashable], through: Callable[[Hashable, Tensor, Sequence[int]], Tensor]) -> None:
        """Put segments of one kind together through `through(kind, tokens, places)`, which may change their layouts."""
        runs = [(kind, list(places)) for kind, places in groupby(range(len(kinds)), kinds.__getitem__)]
        if len(runs) == 1:
            self.x = through(runs[0][0], self.x, runs[0][1])
            return
        parts = list(self.x.split([self._tokens(places) for _, places in runs]))
        for kind in dict.fromkeys(kinds):
            mine = [k for k, run in enumerate(runs) if run[0] == kind]
            y = through(kind, join([parts[k] for k in mine]), [i for k in mine for i in runs[k][1]])
            for k, part in zip(mine, y.split([self._tokens(runs[k][1]) for k in mine]), strict=True):
                parts[k] = part
        self.x = join(parts)

    def _tokens(self, places: Sequence[int]) -> int:
        return sum(self.layouts[i].tokens for i in places)
