"""The losses against hand arithmetic and independent formulations."""

import math

import pytest
import torch
import torch.nn.functional as F

from blip.objectives.captioning import captioning_loss
from blip.objectives.contrast import Contrast
from blip.objectives.matching import matching_loss
from blip.objectives.negatives import Queue, Queued, hard_negatives
from blip.objectives.similarity import Embedded, EmbeddedPair, cosine
from blip.objectives.targets import Distilled, OwnPartner


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def queue(features):
    made = Queue(*features.shape)
    made.features.copy_(features)
    return made


def contrastive(student, teacher, images, texts, temperature, alpha, target=None):
    """BLIP's ITC of the parts."""
    negatives = Queued(queue(images), queue(texts))
    return Contrast(cosine, negatives, Distilled(target or OwnPartner(), alpha))(student, teacher, temperature, teacher)


def test_contrastive_of_orthogonal_pairs_by_hand():
    identity = torch.eye(2)
    pair, empty = EmbeddedPair(Embedded(identity), Embedded(identity)), torch.zeros(0, 2)
    loss, cosines = contrastive(pair, pair, empty, empty, torch.tensor(0.5), alpha=0.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert torch.equal(cosines.image_to_text, identity)
    # With alpha 1 the target is the softmax itself and the loss its entropy.
    p = 1 / (1 + math.exp(-2))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    loss, _ = contrastive(pair, pair, empty, empty, torch.tensor(0.5), alpha=1.0)
    assert loss.item() == pytest.approx(entropy)


def test_contrastive_equals_soft_target_cross_entropy():
    student, teacher = (
        EmbeddedPair(*(Embedded(unit(5, 8, seed=seed)) for seed in seeds)) for seeds in ((0, 1), (2, 3))
    )
    images, texts, temperature, alpha = unit(11, 8, seed=4), unit(11, 8, seed=5), torch.tensor(0.07), 0.3
    expected = 0
    for query, slow, key, queue in (
        (student.image, teacher.image, teacher.text, texts),
        (student.text, teacher.text, teacher.image, images),
    ):
        everything = torch.cat([key.vector, queue]).double()
        soft = (slow.vector.double() @ everything.T / 0.07).softmax(1)
        target = alpha * soft + (1 - alpha) * torch.eye(5, 16).double()
        expected += F.cross_entropy(query.vector.double() @ everything.T / 0.07, target) / 2
    loss, _ = contrastive(student, teacher, images, texts, temperature, alpha)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)


def test_hard_negatives_follow_the_weights_and_never_pick_the_true_one():
    cosines = torch.tensor([[0.9, 0.3, 0.1], [0.2, 0.5, 0.2], [0.9, -0.9, 0.9]])
    own, temperature, same = torch.arange(3), torch.tensor(0.1), torch.eye(3).bool()
    torch.manual_seed(0)
    draws = torch.stack([hard_negatives(cosines, temperature, 1e-4, same)[0] for _ in range(4000)])
    assert not (draws == own).any()
    weights = (cosines / 0.1).softmax(1) + 1e-4
    expected = weights[0, 1] / (weights[0, 1] + weights[0, 2])
    assert (draws[:, 0] == 1).float().mean().item() == pytest.approx(expected.item(), abs=0.03)
    assert (draws[:, 1] == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_hard_negatives_survive_underflow_and_refuse_a_single_pair():
    cosines = torch.full((2, 2), -1.0).fill_diagonal_(1.0)
    drawn, is_drawn = hard_negatives(cosines, torch.tensor(0.001), 1e-4, torch.eye(2).bool())
    assert drawn.tolist() == [1, 0]
    assert is_drawn.tolist() == [True, True]
    with pytest.raises(ValueError, match="at least 2 pairs"):
        hard_negatives(torch.ones(1, 1), torch.tensor(0.1), 1e-4, torch.ones(1, 1).bool())


def test_negatives_are_drawn_where_features_are_not_finite():
    # The losses are NaN then, and the loop names the pairs; a draw that raises would end the run without saying them.
    cosines, temperature, own = torch.full((3, 3), float("nan")), torch.tensor(0.1), torch.arange(3)
    cosines[0] = 0.5
    drawn, is_drawn = hard_negatives(cosines, temperature, 1e-4, torch.eye(3, dtype=torch.bool))
    assert all(drawn != own)
    assert set(drawn.tolist()) <= {0, 1, 2}
    assert all(is_drawn)


def test_matching_loss_of_a_constant_predictor_is_the_entropy_of_a_third():
    prior = torch.tensor([math.log(2 / 3), math.log(1 / 3)]).expand(9, 2)
    assert matching_loss(prior, positives=3).item() == pytest.approx(0.6365, abs=1e-4)


def test_captioning_loss_by_hand():
    logits, targets = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, -100])
    log_z = math.log(math.exp(2) + 2)
    expected = 0.9 * (log_z - 2) + 0.1 * (log_z - 2 / 3)
    assert captioning_loss(logits, targets, smoothing=0.1).item() == pytest.approx(expected)
