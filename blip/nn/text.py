"""A text transformer: embeddings of words and positions, a stack, and a head that predicts words.

B contexts, R rows of text, T text tokens, N packed tokens, P context tokens, D width, V context width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.nn.context import Context
from blip.nn.linear import Linear, linear
from blip.nn.packing import Layout, join, split
from blip.nn.settings import TextConfig, TrainingOptions
from blip.nn.stack import Cache, Pass, Segment, Stack


@dataclass
class TextPass:
    """One use of a text transformer: R texts, and how and to what they attend."""

    ids: Tensor
    """(R, T) int64."""
    keep: Tensor
    """(R, T) bool, False at padding; tokens are a prefix of every row, and there is at least one."""
    causal: bool = False
    """Whether to decode (each token sees itself and those before it) instead of encode."""
    context: Context | Sequence[Context] | None = None
    """Contexts as in `Segment`."""
    first: bool = False
    """Whether to return only the first token's state."""

    def __post_init__(self) -> None:
        self.layout = Layout(*self.keep.shape, self.keep)


class TextTransformer(nn.Module):
    """Embeddings, a stack whose self-attentions are called `text` and `causal`, and the head that predicts words."""

    def __init__(self, config: TextConfig, options: TrainingOptions, blocks: Stack, head: bool = False) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = blocks
        if head:
            self.head_dense = Linear(config.width, config.width)
            self.head_norm = nn.LayerNorm(config.width, config.norm_eps)
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Initialise one module's weights as in BERT."""
        if isinstance(module, (Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def context(self, states: Tensor, keep: Tensor | None = None, queries: int | None = None) -> Context:
        """Project states once for all cross-attentions; arguments as in `Stack.context`."""
        return self.blocks.context(states, keep, queries)

    def forward(self, passes: Sequence[TextPass]) -> list[Tensor]:
        """Run passes side by side -> for each the states (N, D) that its `layout` unpacks, or (R, D) if `first`."""
        longest = max(one.ids.shape[1] for one in passes)
        if longest > self.config.max_positions:
            raise ValueError(f"a text of {longest} tokens exceeds the model's {self.config.max_positions} positions")
        layouts = [one.layout for one in passes]
        ids = join([one.layout.pack_ids(one.ids) for one in passes])
        positions = [torch.arange(one.ids.shape[1], device=ids.device).expand_as(one.ids) for one in passes]
        x = self._embed(ids, join([one.layout.pack_ids(at) for one, at in zip(passes, positions, strict=True)]))
        run = []
        for one, states in zip(passes, split(x, layouts), strict=True):
            segment = Segment(states, one.layout, one.context)
            run.append(Pass([segment], "causal" if one.causal else "text", one.causal, first=one.first))
        return [states for (states,) in self.blocks(run)]

    def step(self, ids: Tensor, positions: Tensor, sees: Tensor | None, cache: Cache, context: Context) -> Tensor:
        """Decode T more tokens per row, ids and positions (R, T), after those in the cache -> states (R, T, D).

        `sees` (R, T, cached + T) is True where a token sees a cached or a new token; None: everywhere.
        """
        segment = Segment(self._embed(ids.flatten(), positions.flatten()), Layout(*ids.shape), context)
        ((states,),) = self.blocks([Pass([segment], "causal", after=cache, sees=sees)])
        cache.filled += ids.shape[1]
        return states.view(*ids.shape, -1)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.norm(self.word(ids) + self.position(positions)))

    def vocabulary(self, states: Tensor) -> Tensor:
        """States (..., D) -> logits (..., vocabulary); the word embedding is the last layer's weight."""
        states = self.head_norm(F.gelu(self.head_dense(states)))
        return linear(states, self.word.weight, self.head_bias)
