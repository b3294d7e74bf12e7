"""A context that one product projects for all layers is the one that each layer projects."""

import pytest
import torch

from blip.nn.context import Joined, _project_at_once, project
from blip.nn.linear import Linear

B, P, V, D, HEADS, LAYERS = 4, 5, 12, 16, 2, 3


def results(context, queries):
    """What rows see in each layer: two of each context, and one of contexts that were chosen, one of them twice."""
    chosen = context[torch.tensor([2, 0, 2])]
    return [context.expand(2).attend(layer, queries, 0.0).sum((1, 2)) for layer in range(LAYERS)] + [
        chosen.attend(layer, queries[:3], 0.0).sum((1, 2)) for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_usual_one(masked):
    torch.manual_seed(0)
    maps = [Linear(V, 2 * D).double() for _ in range(LAYERS)]
    states, queries = torch.randn(B, P, V, dtype=torch.double), torch.randn(2 * B, 3, D, dtype=torch.double)
    keep = torch.arange(P) < torch.tensor([5, 3, 4, 1])[:, None] if masked else None
    both = []
    for make in (project, _project_at_once):
        inputs = states.clone().requires_grad_(), queries.clone().requires_grad_()
        context = make(maps, inputs[0], HEADS, keep)
        values = results(context, inputs[1])
        weighted = sum((i + 1) * value.sum() for i, value in enumerate(values))
        gradients = torch.autograd.grad(weighted, [*inputs, *(p for kv in maps for p in kv.parameters())])
        both.append([*values, *gradients])
    assert len(context) == B
    assert isinstance(context[torch.tensor([1])], Joined)
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_its_gradients_are_put_together_once():
    """One concatenation and one product each way, however many layers and uses there are."""
    maps = [Linear(V, 2 * D) for _ in range(LAYERS)]
    states = torch.randn(B, P, V, requires_grad=True)
    context = _project_at_once(maps, states, HEADS, None)
    values = [context.expand(n).attend(layer, torch.randn(n * B, 2, D), 0.0) for layer in range(LAYERS) for n in (1, 2)]
    with torch.profiler.profile() as profile:
        sum(value.sum() for value in values).backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::cat"] == 1
    assert "aten::stack" not in counts
