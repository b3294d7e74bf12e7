"""CLIP's contrast against transformers' loss, in two processes against the joined batch, and the seam it stands on."""

import pytest
import torch
import torch.nn.functional as F
from stub_run import the_zygote
from test_distributed import batch_of, both_batches
from test_losses import unit
from test_objectives import CONFIG, make_batch
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from blip import dist
from blip.models.blip import Blip
from blip.objectives.clip import Clip, ClipConfig
from blip.objectives.contrast import Contrast
from blip.objectives.negatives import InBatch
from blip.objectives.objective import Clock
from blip.objectives.similarity import Embedded, EmbeddedPair
from blip.objectives.targets import OwnPartner


def build() -> Clip:
    torch.manual_seed(0)
    clip = Clip(Blip(CONFIG), ClipConfig())
    with torch.no_grad():
        for p in clip.model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return clip.train()


def theirs(model: Blip, batch) -> torch.Tensor:
    image, text = model.embed_image(model.vision(batch.image)), model.embed_text(batch.ids, batch.keep)
    return image_text_contrastive_loss(text @ image.T / model.temperature)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5 * value.abs().max().item() + 1e-9, msg=name)


def test_loss_and_gradients_are_those_of_transformers():
    clip, batch = build(), make_batch()
    outcome = clip(batch, Clock())
    ours, expected = outcome.losses["itc"], theirs(clip.model, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    grads = gradients(clip.model, ours)
    assert_same(grads, gradients(clip.model, expected))
    assert "temperature" in grads
    # What contrast does not use is left alone.
    unused = ("cross", "causal", "head", "match")
    assert {n for n, _ in clip.model.named_parameters()} - grads.keys() == {
        n for n, _ in clip.model.named_parameters() if any(word in n for word in unused)
    }
    image, text = clip.model.embed_image(clip.model.vision(batch.image)), clip.model.embed_text(batch.ids, batch.keep)
    best = (image @ text.T).argmax(1)
    assert outcome.health["itc_recall_i2t"].item() == pytest.approx((best == torch.arange(5)).float().mean().item())


def test_the_temperature_is_clamped_and_nothing_else_moves():
    clip = build()
    with torch.no_grad():
        clip.model.temperature.fill_(0.001)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    clip.after_step([None])
    moved = [name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["model.temperature"]
    assert clip.model.temperature.item() == pytest.approx(0.01)
    with pytest.raises(ValueError, match="temperature_min"):
        ClipConfig(temperature_min=0.6)


def batches_of_everyone() -> None:
    dist.start(60)
    clip = build()
    outcome = clip(batch_of(dist.rank()), Clock())
    ours = gradients(clip.model, outcome.losses["itc"])
    plain = build()
    expected = theirs(plain.model, both_batches())
    # A process scores its own five pairs among all ten; the mean over processes is the loss of the joined batch.
    mean = dist.total(outcome.losses["itc"]) / 2
    torch.testing.assert_close(mean, expected.detach(), rtol=1e-6, atol=1e-6)
    means = {name: dist.total(value) / 2 for name, value in ours.items()}
    assert_same(means, gradients(plain.model, expected))
    image = plain.model.embed_image(plain.model.vision(both_batches().image))
    text = plain.model.embed_text(both_batches().ids, both_batches().keep)
    right = ((text @ image.T).argmax(1) == torch.arange(10)).float().mean()
    recall = dist.total(outcome.health["itc_recall_t2i"]) / 2
    assert recall.item() == pytest.approx(right.item())


def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    statuses = the_zygote().run(tmp_path / "log", world=2, module="test_clip", function="batches_of_everyone")
    assert statuses == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()


def test_a_similarity_of_tokens_takes_the_place_of_the_cosine():
    """FILIP's: each token of a query takes its most similar token of the key; the mean over the query's tokens."""

    def late(query: Embedded, key: Embedded) -> torch.Tensor:
        scores = torch.einsum("nte,cpe->nctp", query.tokens, key.tokens)
        best = scores.masked_fill(~key.mask[None, :, None], -2.0).amax(3)
        return (best * query.mask[:, None]).sum(2) / query.mask.sum(1)[:, None]

    image = Embedded(unit(3, 8, seed=0), unit(3, 4, 8, seed=1), torch.ones(3, 4).bool())
    text = Embedded(unit(3, 8, seed=2), unit(3, 5, 8, seed=3), torch.arange(5) < torch.tensor([[5], [2], [3]]))
    loss, _ = Contrast(late, InBatch(), OwnPartner())(
        EmbeddedPair(image, text), EmbeddedPair(image, text), torch.tensor(0.1)
    )

    def score(query: Embedded, i: int, key: Embedded, j: int) -> float:
        best = [
            max(float(token @ other) for other, kept in zip(key.tokens[j], key.mask[j], strict=True) if kept)
            for token, kept in zip(query.tokens[i], query.mask[i], strict=True)
            if kept
        ]
        return sum(best) / len(best)

    i2t = torch.tensor([[score(image, i, text, j) for j in range(3)] for i in range(3)])
    t2i = torch.tensor([[score(text, i, image, j) for j in range(3)] for i in range(3)])
    expected = sum(F.cross_entropy(scores / 0.1, torch.arange(3)) for scores in (i2t, t2i)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
