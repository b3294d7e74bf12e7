"""The pre-training objective against the straightforward implementation, and what must not change it."""

import dataclasses

import oracle
import pytest
import torch

from blip.models.blip import Blip
from blip.models.settings import BlipConfig
from blip.nn.settings import TextConfig, VisionConfig
from blip.objectives import negatives, targets
from blip.objectives.batch import Batch
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain, PretrainConfig

CONFIG = BlipConfig(
    vision=VisionConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=48, depth=2, heads=3),
    text=TextConfig(
        vocab_size=120, width=32, layers=3, heads=4, hidden=64, max_positions=40, dropout=0.0, attention_dropout=0.0,
        cls_id=2, sep_id=3, dec_id=118, enc_id=119,
    ),
    embed_dim=16,
)  # fmt: skip
NEGATIVES = torch.tensor([2, 0, 3, 1, 0]), torch.tensor([1, 4, 0, 2, 3])


def build(**options) -> Pretrain:
    torch.manual_seed(0)
    config = PretrainConfig(**{"queue_size": 24, "alpha_ramp_epochs": 0, **options})
    pretrain = Pretrain(Blip(CONFIG), config)
    with torch.no_grad():
        for p in pretrain.model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return pretrain.train()


def make_batch(lengths=(9, 4, 12, 3, 7), seed=1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    size, longest = len(lengths), max(lengths)
    ids = torch.randint(4, 118, (size, longest), generator=g)
    keep = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids[:, 0] = 2
    ids[torch.arange(size), torch.tensor(lengths) - 1] = 3
    return Batch(
        torch.randn(size, 3, 32, 32, generator=g), ids.masked_fill(~keep, 0), keep, [f"{i}" for i in range(size)]
    )


@pytest.fixture
def fixed_negatives(monkeypatch):
    """Negatives by table instead of by draw: image of text first, then text of image."""

    def use(image_of_text, text_of_image):
        answers = iter([image_of_text, text_of_image] * 10)
        monkeypatch.setattr(negatives, "hard_negatives", lambda *_: (next(answers), None))

    use(*NEGATIVES)
    return use


def gradients(pretrain, total):
    pretrain.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in pretrain.model.named_parameters()}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=1e-5 * theirs[name].abs().max().item() + 1e-9, msg=name
        )


@pytest.mark.parametrize("lengths", [(9, 4, 12, 3, 7), (8, 8, 8, 8, 8), (3, 3, 3, 3, 30)])
def test_fast_path_equals_the_oracle_in_losses_and_gradients(fixed_negatives, lengths):
    pretrain, batch = build(), make_batch(lengths)
    outcome = pretrain(batch, Clock(epoch=1.0))
    ours = gradients(pretrain, sum(outcome.losses.values()))
    expected, teacher = oracle.losses(pretrain, batch.image, batch.ids, batch.keep, alpha=0.4, negatives=NEGATIVES)
    for name, value in zip(("itc", "itm", "lm"), expected, strict=True):
        torch.testing.assert_close(outcome.losses[name], value, rtol=1e-5, atol=1e-6)
    theirs = gradients(pretrain, sum(expected))
    assert_same_gradients(ours, theirs)
    torch.testing.assert_close(outcome.carry.image.vector, teacher[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcome.carry.text.vector, teacher[1], rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing(fixed_negatives):
    pretrain, batch = build(), make_batch()
    wide = Batch(
        batch.image,
        torch.nn.functional.pad(batch.ids, (0, 11), value=77),
        torch.nn.functional.pad(batch.keep, (0, 11)),
        batch.keys,
    )
    a, b = pretrain(batch, Clock(epoch=1.0)), pretrain(wide, Clock(epoch=1.0))
    for name in a.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name], rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(pretrain, sum(a.losses.values())), gradients(pretrain, sum(b.losses.values())))


def test_batch_order_changes_nothing_but_the_negatives(fixed_negatives):
    pretrain, batch = build(), make_batch()
    before = pretrain(batch, Clock(epoch=1.0))
    order = torch.tensor([3, 0, 4, 1, 2])
    place = order.argsort()
    fixed_negatives(place[NEGATIVES[0][order]], place[NEGATIVES[1][order]])
    mixed = Batch(batch.image[order], batch.ids[order], batch.keep[order], [batch.keys[i] for i in order])
    after = pretrain(mixed, Clock(epoch=1.0))
    for name in before.losses:
        torch.testing.assert_close(before.losses[name], after.losses[name], rtol=1e-5, atol=1e-6)


def test_forward_changes_nothing_and_after_step_moves_teacher_and_queues(fixed_negatives):
    pretrain, batch = build(queue_size=7, momentum=0.9), make_batch()
    with torch.no_grad():
        pretrain.model.temperature.fill_(0.9)
    before = {name: value.clone() for name, value in pretrain.state_dict().items()}
    carry = pretrain(batch, Clock(epoch=1.0)).carry
    for name, value in pretrain.state_dict().items():
        assert torch.equal(value, before[name]), name
    pretrain.after_step([carry, carry])
    assert pretrain.model.temperature.item() == 0.5
    name = "teacher.towers.med.word.weight"
    expected = 0.9 * before[name] + 0.1 * before["model.med.word.weight"]
    torch.testing.assert_close(pretrain.state_dict()[name], expected, rtol=1e-5, atol=1e-7)
    # 10 rows into a ring of 7: rows 0-4 at 0-4, then 0-4 again at 5, 6, 0, 1, 2.
    ring = torch.stack([carry.text.vector[i] for i in (2, 3, 4, 3, 4, 0, 1)])
    assert torch.equal(pretrain.text_queue.features, ring)
    assert pretrain.text_queue.next.item() == 3


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 13])
def test_a_queue_of_any_size_takes_batches_of_any_size(size):
    pretrain = build(queue_size=size)
    pushed = []
    for count in (4, 1, 4, 9, 2):
        features = torch.randn(count, 16)
        pushed.extend(features)
        pretrain.image_queue.push(features)
    queued = {tuple(row.tolist()) for row in pretrain.image_queue.features}
    assert queued == {tuple(row.tolist()) for row in pushed[len(pushed) - size :]}


def test_alpha_rises_over_the_first_epochs(fixed_negatives, monkeypatch):
    pretrain, batch, seen = build(alpha_ramp_epochs=2.0), make_batch(), []
    real = targets.Distilled.__init__
    monkeypatch.setattr(targets.Distilled, "__init__", lambda *a: (seen.append(a[-1]), real(*a))[1])
    for epoch in (0.0, 0.5, 1.0, 2.0, 9.0):
        pretrain(batch, Clock(epoch=epoch))
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4])


def test_teacher_gets_no_gradient_and_no_dropout():
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, dropout=0.5, attention_dropout=0.5))
    torch.manual_seed(0)
    pretrain = Pretrain(Blip(config), PretrainConfig(queue_size=8)).train()
    batch = make_batch()
    first, second = pretrain(batch, Clock()), pretrain(batch, Clock())
    assert torch.equal(first.carry.text.vector, second.carry.text.vector)
    assert not torch.equal(first.losses["lm"], second.losses["lm"])
    sum(first.losses.values()).backward()
    assert all(p.grad is None for p in pretrain.teacher.parameters())
    noisy = Pretrain(Blip(config), PretrainConfig(queue_size=8, teacher_dropout=True)).train()
    assert not torch.equal(noisy(batch, Clock()).carry.text.vector, noisy(batch, Clock()).carry.text.vector)


def test_every_weight_of_the_student_is_trained(fixed_negatives):
    pretrain = build()
    sum(pretrain(make_batch(), Clock(epoch=1.0)).losses.values()).backward()
    assert [name for name, p in pretrain.model.named_parameters() if p.grad is None] == []
