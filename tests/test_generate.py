"""Decoding against an uncached loop."""

import pytest
import torch
from test_objectives import CONFIG

from blip.generate import greedy
from blip.model import Blip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    model = Blip(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.med.word.weight[CONFIG.text.sep_id] *= 6.0  # some rows stop early, some never
    return model


def uncached(model, context, prompt, max_length):
    rows = []
    for r in range(len(prompt)):
        ids, one = prompt[r : r + 1], context[torch.tensor([r])]
        while ids.shape[1] < max_length and ids[0, -1] != CONFIG.text.sep_id:
            logits = model.caption_logits(ids, torch.ones_like(ids, dtype=torch.bool), one)
            ids = torch.cat([ids, logits[:, -1].argmax(1, keepdim=True)], dim=1)
        rows.append(ids[0].tolist())
    return rows


def test_greedy_equals_an_uncached_loop_row_by_row(model):
    torch.manual_seed(5)
    with torch.no_grad():
        context = model.context(model.vision(torch.randn(12, 3, 32, 32)))
        prompt = torch.cat([torch.full((12, 1), 118), torch.randint(4, 118, (12, 2))], dim=1)
        ours = greedy(model, context, prompt, 14)
        theirs = uncached(model, context, prompt, 14)
    assert len({len(row) for row in theirs}) > 1, "the test needs rows that end at different lengths"
    width = ours.shape[1]
    assert ours.tolist() == [row + [0] * (width - len(row)) for row in theirs]


def test_lengths_that_cannot_be_are_refused(model):
    context = model.context(torch.zeros(1, 17, 48))
    for length in (1, 41):
        with pytest.raises(ValueError, match="max_length"):
            greedy(model, context, torch.tensor([[118]]), length)
