"""Learning-rate curves against hand arithmetic; what is decayed and what is not."""

import dataclasses

import pytest
import torch
from torch import nn

from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.train.optim import Float32Muon, build, learning_rate, orthogonal, parameter_groups
from blip.train.settings import TrainConfig

PRETRAIN = TrainConfig(schedule="epoch_decay")  # 1e-6 -> 3e-4 over 3000 steps, then 0.9 per epoch
CAPTION = TrainConfig(schedule="epoch_cosine", epochs=5, lr=1e-5, min_lr=0.0, warmup_steps=0)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (1500, 1.505e-4),  # half way between
        (3000, 3e-4),
        (4860, 3e-4),  # end of the first epoch: reached and held
        (4861, 2.7e-4),
        (2 * 4861, 2.43e-4),
        (20 * 4861 - 1, 4.05255e-5),  # 3e-4 * 0.9^19, 0.9^19 = 0.1350852
        (60 * 4861, 1e-6),  # 3e-4 * 0.9^60 = 5.4e-7 is below the floor
    ],
)
def test_epoch_decay_is_the_schedule_of_2022(step, expected):
    assert learning_rate(step, PRETRAIN, 4861, 20 * 4861) == pytest.approx(expected, rel=1e-5)


def test_warm_up_of_2022_ends_with_the_first_epoch_finished_or_not():
    assert learning_rate(999, PRETRAIN, 1000, 20_000) == pytest.approx(1e-6 + 2.99e-4 * 0.333)
    assert learning_rate(1000, PRETRAIN, 1000, 20_000) == pytest.approx(2.7e-4)


def test_epoch_cosine_moves_by_whole_epochs_to_zero():
    per_epoch = [learning_rate(epoch * 100, CAPTION, 100, 500) for epoch in range(5)]
    # (1 + cos(k * 36 degrees)) / 2
    assert per_epoch == pytest.approx([1e-5, 0.9045085e-5, 0.6545085e-5, 0.3454915e-5, 0.0954915e-5])
    assert learning_rate(199, CAPTION, 100, 500) == per_epoch[1]


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1e-6), (1500, 1.505e-4), (3000, 3e-4), (8000, 1.505e-4), (13_000, 1e-6)]
)
def test_cosine_after_warm_up(step, expected):
    assert learning_rate(step, TrainConfig(), 1000, 13_000) == pytest.approx(expected)


def test_constant():
    config = TrainConfig(schedule="constant", warmup_steps=10)
    assert [learning_rate(step, config, 5, 100) for step in (0, 5, 10, 99)] == pytest.approx(
        [1e-6, 1.505e-4, 3e-4, 3e-4]
    )


@pytest.mark.parametrize("schedule", ["cosine", "epoch_decay", "epoch_cosine", "constant"])
def test_runs_shorter_than_the_warm_up_or_an_epoch(schedule):
    config = TrainConfig(schedule=schedule, warmup_steps=50, steps=3)
    rates = [learning_rate(step, config, 0.125 if schedule == "cosine" else 10.0, 3) for step in range(3)]
    assert all(0 < rate < 1e-4 for rate in rates)
    assert learning_rate(0, dataclasses.replace(config, warmup_steps=0), 10.0, 1) == pytest.approx(3e-4)


def test_an_epoch_begins_on_its_step_whatever_the_division_rounds_to():
    for pairs in range(1, 60):
        for batch in range(1, 20):
            step = pairs * 3  # exactly 3 * batch epochs
            expected = max(1e-30, 0.5 ** (3 * batch))
            config = TrainConfig(schedule="epoch_decay", decay=0.5, lr=1.0, min_lr=1e-30, warmup_steps=0)
            assert learning_rate(step, config, pairs / batch, 10**6) == pytest.approx(expected), (pairs, batch)


def names(module, group):
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {of[id(parameter)] for parameter in group["params"]}


def test_norms_biases_places_and_temperature_are_not_decayed():
    model = Blip(TINY)
    decayed, rest = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    kept = names(model, rest)
    assert {"temperature", "vision.vit.cls_token", "vision.vit.pos_embed", "med.position.weight"} <= kept
    assert all(p.ndim < 2 for p in rest["params"] if p.ndim != 3 and p is not model.med.position.weight)
    assert {"med.word.weight", "image_proj.weight", "match_head.weight"} <= names(model, decayed)
    assert not any(name.endswith(".bias") or "norm" in name for name in names(model, decayed))
    assert names(model, decayed) | kept == {name for name, _ in model.named_parameters()}


def test_in_2022_everything_was_decayed():
    (group,) = parameter_groups(Blip(TINY), 0.05, decay_all=True)
    assert group["weight_decay"] == 0.05
    assert len(group["params"]) == len(list(Blip(TINY).parameters()))


def test_frozen_parameters_are_left_out_and_shared_ones_appear_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    module = nn.ModuleList([first, second, nn.Linear(3, 3).requires_grad_(False)])
    assert sum(len(group["params"]) for group in parameter_groups(module, 0.1)) == 2
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(module.requires_grad_(False), TrainConfig())


def test_one_step_of_adamw_by_hand():
    module = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    optimizer = build(module, TrainConfig(lr=0.1, weight_decay=0.5))
    module.weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    # Decay: 2 * (1 - 0.1 * 0.5) = 1.9; the first step of Adam is lr * sign of the gradient.
    assert torch.allclose(module.weight, torch.tensor([[1.8, 2.0]]))


MUON = TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.0, warmup_steps=0)


class Stack(nn.Module):
    """One matrix inside a block and a layer outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(16, 64)])
        self.head = nn.Linear(16, 2)

    def step(self, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_muon_gives_the_matrices_of_blocks_updates_of_equal_singular_values():
    module = Stack()
    before = [p.detach().clone() for p in module.parameters()]
    module.step(build(module, MUON), seed=1)
    matrix, *rest = [p.detach() - old for p, old in zip(module.parameters(), before, strict=True)]
    # Scaled to AdamW's size: orthogonal directions times 0.2 * sqrt(64), as near to orthogonal as five iterations get.
    values = torch.linalg.svdvals(matrix) / (0.1 * 0.2 * 8)
    assert values.shape == (16,)
    assert ((values > 0.6) & (values < 1.3)).all(), values
    # What is not a matrix in a block gets the first step of AdamW: lr times the gradient's sign.
    assert all(torch.allclose(change.abs(), torch.full_like(change, 0.1), atol=1e-4) for change in rest)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (24, 24), (1, 9)])
def test_muon_in_float32_is_pytorchs_up_to_bfloat16(shape):
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [Float32Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    change = (ours - theirs).norm() / (theirs - start).norm()
    assert 0 < change < 0.03
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(
        *(o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (ours, theirs), strict=True)), **close
    )
    optimizers[0].load_state_dict(optimizers[1].state_dict())  # a run may go on elsewhere


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (24, 24)])
def test_float32_orthogonalises_as_exact_arithmetic_does(shape):
    """By the singular vectors and the iteration's polynomial of each singular value, in float64."""
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = left @ values.diag() @ right
    ours = orthogonal(matrix, coefficients, 5, 1e-7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5)
    # Half way from the matrix to its polar factor, at least: all directions nearly of one length.
    assert (ours.double() - left @ right).norm() / (left @ right).norm() < 0.3
    assert orthogonal(torch.zeros(shape), coefficients, 5, 1e-7).eq(0).all()


def test_muon_without_a_matrix_or_with_nothing_else():
    """As where heads alone are trained, or blocks alone."""
    for frozen, names in (("blocks", ["AdamW"]), ("head", ["AdamW", "Muon"])):
        module = Stack()
        getattr(module, frozen).requires_grad_(False)
        optimizer = build(module, MUON)
        assert [type(part).__name__ for part in optimizer.parts] == names
        before = [p.detach().clone() for p in module.parameters()]
        module.step(optimizer, seed=1)
        changed = [not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)]
        assert changed == [p.requires_grad for p in module.parameters()]
        again = build(module, MUON)
        again.load_state_dict(optimizer.state_dict())
    bare = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4, bias=False)])})
    (part,) = build(bare, MUON, bfloat16=False).parts
    assert type(part) is Float32Muon


def test_muon_continues_to_the_bit():
    whole, module = Stack(), Stack()
    optimizer = build(whole, MUON)
    for seed in range(6):
        whole.step(optimizer, seed)
    first = build(module, MUON)
    for seed in range(3):
        module.step(first, seed)
    second = build(module, MUON)
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        module.step(second, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(), strict=True))
    assert len(optimizer.param_groups) == 3  # AdamW's decayed and not, and Muon's
