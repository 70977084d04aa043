"""Norms against their formulas."""

import pytest
import torch

from sinkbed.model.norms import NORMS
from tests.support.plain import assert_same, config, drawn, stream


def rms(x, weight, eps=1e-2):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer(x, weight, bias=0.0, eps=1e-2):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def dynamic_tanh(x, alpha, weight, bias):
    return torch.tanh(alpha * x) * weight + bias


@pytest.mark.parametrize(
    ("choice", "plain"),
    [("rms", rms), ("layer", layer), ({"layer": {"bias": False}}, layer), ("dynamic_tanh", dynamic_tanh)],
    ids=["rms", "layer", "layer without bias", "dynamic_tanh"],
)
@pytest.mark.parametrize("fused", [True, False], ids=["as on a CPU", "as elsewhere"])
def test_a_norm_is_its_formula(choice, plain, fused, monkeypatch):
    for module in ("rms", "dynamic_tanh"):
        monkeypatch.setattr(f"sinkbed.model.norms.{module}.is_eager_cpu", lambda x: fused)
    norm = drawn(NORMS.make(choice, config(norm=choice, norm_eps=1e-2)))
    assert_same(norm, lambda x: plain(x, *norm.parameters()), norm, 0.1 * stream())


@pytest.mark.parametrize("choice", ["rms", "layer"])
def test_the_gradient_of_a_weight_in_bfloat16_is_not_summed_in_bfloat16(choice):
    """Regression: 59 % off over 16,384 rows."""
    norm = drawn(NORMS.make(choice, config(norm=choice))).bfloat16()
    x, upstream = (torch.randn(8192, norm.weight.numel(), dtype=torch.float64).bfloat16() for _ in range(2))
    norm(x).backward(upstream)
    gradient = norm.weight.grad.double()
    norm.double().zero_grad()
    norm(x.double()).backward(upstream.double())
    assert (gradient - norm.weight.grad).norm() < 0.02 * norm.weight.grad.norm()


def test_dynamic_tanh_starts_at_its_alpha():
    norm = NORMS.make({"dynamic_tanh": {"alpha": 0.8}}, config())
    x = stream().float()
    torch.testing.assert_close(norm(x), torch.tanh(0.8 * x))
