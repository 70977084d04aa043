"""Feed-forwards against their formulas."""

import math

import pytest
import torch

from sinkbed.model import Decoder
from sinkbed.model.feed_forward import FEED_FORWARDS
from tests.support.plain import assert_same, config, drawn, forward_pass, stream


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def relu(x):
    return x * (x > 0)


@pytest.mark.parametrize(
    ("name", "activation"), [("gelu", gelu), ("relu", relu), ("relu2", lambda x: relu(x) ** 2), ("silu", silu)]
)
def test_two_matrices_around_an_activation(name, activation):
    layer = drawn(FEED_FORWARDS.make(name, config()))
    assert [*dict(layer.named_parameters())] == ["up.weight", "down.weight"], "no biases"

    def plain(x):
        return activation(x @ layer.up.weight.T) @ layer.down.weight.T

    assert_same(layer, plain, layer, stream())


@pytest.mark.parametrize(("name", "activation"), [("geglu", gelu), ("reglu", relu), ("swiglu", silu)])
def test_three_matrices_with_a_gate(name, activation):
    layer = drawn(FEED_FORWARDS.make(name, config()))

    def plain(x):
        gate, up = layer.gate_up.weight.chunk(2) if name == "swiglu" else (layer.gate.weight, layer.up.weight)
        return (activation(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T

    assert_same(layer, plain, layer, stream())


def test_linear_is_one_square_matrix():
    layer = drawn(FEED_FORWARDS.make("linear", config(feed_forward="linear", d_ff=0)))
    assert layer.down.weight.shape == (20, 20)
    assert_same(layer, lambda x: x @ layer.down.weight.T, layer, stream())


def test_none_leaves_attention_alone():
    model = Decoder(config(feed_forward="none", d_ff=0), 30)
    assert not [name for name, _ in model.named_parameters() if "feed_forward" in name]
    block = drawn(model).blocks[0]
    h = model.embedding(torch.arange(9)[None])
    run = forward_pass(model.config)
    torch.testing.assert_close(block(h, run)[0], h + block.attention(block.attention_norm(h), run)[0])


@pytest.mark.parametrize("name", ["linear", "none"])
def test_a_width_that_nothing_has_is_refused(name):
    with pytest.raises(ValueError, match=f"d_ff: expected 0 beside feed_forward {name}, got 28"):
        config(feed_forward=name)
