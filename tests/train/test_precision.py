"""Weights that are cast once a step: the same numbers as autocast's, by few operations."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.nn.settings import TrainingOptions
from blip.objectives.batch import Batch
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain, PretrainConfig
from blip.train.precision import CastOnce

VISION = dataclasses.replace(TINY.vision, image_size=32, width=32, heads=2, depth=3)
TEXT = dataclasses.replace(
    TINY.text, vocab_size=200, width=32, hidden=64, cls_id=101, sep_id=102, enc_id=103, dec_id=104
)
OPTIONS = TrainingOptions(dropout=0.1, attention_dropout=0.1)


def objective(options=OPTIONS):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, vision=VISION, text=TEXT, embed_dim=16)
    return Pretrain(Blip(config, options), PretrainConfig(queue_size=8, alpha_ramp_epochs=0))


def batch():
    keep = torch.arange(7) < torch.tensor([7, 5, 4, 6])[:, None]
    ids = (torch.arange(28).view(4, 7) * 5 % 90 + 3).masked_fill(~keep, 0)
    ids[:, 0] = 101
    return Batch(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ids, keep, list("abcd"))


def step(run):
    """Losses and gradients of a step under autocast."""
    torch.manual_seed(1)
    run.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = run(batch(), Clock(epoch=1.0)).losses
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in run.named_parameters() if p.grad is not None}


class Casts(TorchDispatchMode):
    """Counts the casts of some tensors one by one, and the operations that cast several."""

    def __init__(self, tensors):
        super().__init__()
        self.places = {tensor.data_ptr() for tensor in tensors}
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count["one"] += 1
        self.count["together"] += func is torch.ops.aten._foreach_copy_.default
        return func(*args, **(kwargs or {}))


def weights(run):
    return [
        p for part in run.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d) for p in part.parameters()
    ]


@pytest.mark.parametrize("options", [OPTIONS, TrainingOptions(checkpoint=True)], ids=["usual", "checkpoint"])
def test_a_step_is_that_of_autocast(options):
    """To the bit, but for weights of the last block that autocast casts in parts."""
    run = objective(options)
    (losses, gradients), casts = step(run), CastOnce(run, torch.bfloat16)
    with casts.used():
        again, theirs = step(run)
    assert all(torch.equal(again[name], value) for name, value in losses.items())
    assert gradients.keys() == theirs.keys()
    different = {name for name, value in gradients.items() if not torch.equal(theirs[name], value)}
    assert different <= {f"model.med.blocks.1.text.qkv.{name}" for name in ("weight", "bias")}
    for name in different:
        torch.testing.assert_close(theirs[name], gradients[name], rtol=2e-2, atol=1e-2 * gradients[name].abs().max())


def test_weights_are_cast_by_one_operation_a_block():
    """Three blocks of the image encoder, two of text, the rest, and the teacher, which has no gradient."""
    run = objective()
    with Casts(weights(run)) as plain:
        step(run)
    casts = CastOnce(run, torch.bfloat16)
    with Casts(weights(run)) as ours, casts.used():
        step(run)
    assert plain.count["one"] > 100
    assert ours.count["one"] == 0
    assert ours.count["together"] == (3 + 2 + 1) * 2 + 1


def test_a_module_is_itself_meanwhile_and_afterwards():
    run = objective()
    before, inside = dict(run.named_parameters()), run.model.image_proj

    def fail():
        with CastOnce(run, torch.bfloat16).used():
            assert inside.weight.dtype == torch.bfloat16
            assert dict(run.named_parameters()) == before
            assert run.state_dict()["model.image_proj.weight"].dtype == torch.float32
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert inside.weight is before["model.image_proj.weight"]


def test_what_is_locked_later_gets_no_gradient():
    run = objective()
    casts = CastOnce(run, torch.bfloat16)
    run.model.vision.requires_grad_(False)
    with casts.used():
        assert not run.model.vision.vit.blocks[0].attn.qkv.weight.requires_grad
        _, gradients = step(run)
    assert gradients
    assert not [name for name in gradients if ".vision." in name]


def test_compiled_blocks_compute_with_cast_weights():
    """A graph is compiled once, for any number of rows and for weights of one shape."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    casts, fixed = CastOnce(layer, torch.bfloat16), []

    def backend(graph, inputs):
        given = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        assert {x.dtype for x in tensors} == {torch.bfloat16}
        fixed.append(sum(all(type(n) is int for n in x.shape) for x in tensors))
        return graph

    layer.compile(backend=backend, fullgraph=True, dynamic=True)
    for rows in (4, 5, 6):
        with casts.used():
            layer(torch.randn(rows, 8, dtype=torch.bfloat16)).sum().backward()
    assert fixed == [4]
    assert layer[0].weight.grad.dtype == torch.float32
