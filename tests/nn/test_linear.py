"""The linear layer by either library: forward and backward against float64 products, and what takes which way."""

import pytest
import timm
import torch
import torch.nn.functional as F

from blip.nn import linear as module
from blip.nn.linear import Linear, adopt, linear


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 12)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_a_float64_product(monkeypatch, onednn, shape, with_bias):
    monkeypatch.setattr(module, "ONEDNN", onednn)
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(7, 12, requires_grad=True), torch.randn(7, requires_grad=True) if with_bias else None
    inputs = [p for p in (x, weight, bias) if p is not None]
    doubles = [p.detach().double().requires_grad_() for p in inputs]
    out, expected = linear(x, weight, bias), F.linear(*doubles)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, doubles, upstream.double())
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-5)


def test_slices_and_transposes_are_read_where_they_stand(monkeypatch):
    monkeypatch.setattr(module, "ONEDNN", True)
    torch.manual_seed(0)
    weight, x = torch.randn(9, 6), torch.randn(6, 4)
    torch.testing.assert_close(linear(x.t(), weight[3:]), x.t() @ weight[3:].t(), rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_autocast_keeps_its_type(monkeypatch):
    monkeypatch.setattr(module, "ONEDNN", True)
    layer, x = Linear(4, 3).requires_grad_(False), torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_adopting_keeps_weights_names_and_results():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    names, image = list(vit.state_dict()), torch.randn(1, 3, 32, 32)
    before = vit.eval()(image)
    adopt(vit)
    assert list(vit.state_dict()) == names
    assert any(type(part) is Linear for part in vit.modules())
    torch.testing.assert_close(vit(image), before, rtol=1e-4, atol=1e-5)
