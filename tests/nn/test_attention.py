"""Both ways of computing attention agree, and with a loop over queries."""

import math
from types import SimpleNamespace

import pytest
import torch

from blip.nn import attention as module
from blip.nn.attention import attention, prepared


def by_loop(query, key, value, allowed):
    out = torch.zeros_like(query)
    for r, h, t in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        seen = allowed[r, t]
        weights = torch.softmax(query[r, h, t] @ key[r, h, seen].T / math.sqrt(query.shape[-1]), dim=-1)
        out[r, h, t] = weights @ value[r, h, seen]
    return out


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["open", "masked", "causal"])
def test_attention_equals_a_loop(monkeypatch, plain, kind):
    monkeypatch.setattr(module, "plain_is_faster", lambda _: plain)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 5, 8)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    allowed = {
        "open": torch.ones(2, 5, 5, dtype=torch.bool),
        "masked": keep[:, None].expand(2, 5, 5),
        "causal": torch.ones(5, 5).tril().bool().expand(2, 5, 5),
    }[kind]
    mask = keep[:, None, None, :] if kind == "masked" else None
    attended = attention(query, key, value, mask, causal=kind == "causal")
    torch.testing.assert_close(attended, by_loop(query, key, value, allowed), rtol=1e-5, atol=1e-6)


def test_dropout_of_the_plain_way_keeps_the_mean(monkeypatch):
    monkeypatch.setattr(module, "plain_is_faster", lambda _: True)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 400, 1, 4, 8)
    value = torch.ones_like(value)
    out = attention(query, key, value, dropout=0.5)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert out.std() > 0.1


def test_the_plain_way_is_taken_for_bfloat16_on_a_cpu_only():
    x = torch.zeros(1)
    assert not module.plain_is_faster(x)
    assert module.plain_is_faster(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert module.plain_is_faster(x)


@pytest.mark.parametrize("width", [8, 13])
def test_a_mask_of_a_gpu_is_what_is_added_to_the_scores(width):
    """Rows start at multiples of 8 numbers, as its kernel wants; in autocast's type, as queries are."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 4, 8), *torch.randn(2, 2, 3, width, 8)
    mask = torch.rand(2, 1, 4, width) > 0.4
    mask[..., 0] = True
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    bias = prepared(mask, gpu)
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    assert bias.shape == mask.shape
    expected = torch.softmax((query @ key.mT / math.sqrt(8)).masked_fill(~mask, float("-inf")), -1) @ value
    torch.testing.assert_close(attention(query, key, value, bias), expected)
    assert prepared(mask, query) is mask
    assert prepared(mask, SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)).dtype == torch.bfloat16
