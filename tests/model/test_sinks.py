"""Learned sinks against one more key in a textbook softmax."""

import pytest
import torch

from sinkbed.model import Decoder
from sinkbed.model.attention import SelfAttention
from tests.support.plain import assert_same, config, drawn, forward_pass, heads, projections, stream


def key_of(sink):
    """Key and value [H, D] of k_bias and kv_bias."""
    return sink.k.view(4, 6), getattr(sink, "v", torch.zeros_like(sink.k)).view(4, 6)


@pytest.mark.parametrize("name", ["k_bias", "kv_bias"])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_a_bias_is_a_key_that_every_query_sees(name, implementation):
    c = config(sink=name)
    attention = drawn(SelfAttention(c, 0))

    def plain(x):
        return heads(*projections(attention, x), extra=key_of(attention.sink)).flatten(2) @ attention.out.weight.T

    run = forward_pass(c, implementation=implementation)
    assert_same(lambda x: attention(x, run)[0], plain, attention, stream())


def test_the_logit_of_a_bias_is_taken_in_float32_under_autocast():
    bias = SelfAttention(config(sink="k_bias"), 0).sink
    torch.nn.init.normal_(bias.k, std=4)
    q = (4 * torch.randn(2, 4, 9, 6)).bfloat16()
    exact = torch.einsum("bhtd,hd->bht", q.double(), key_of(bias)[0].double()) / 6**0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logit, _ = bias.key(q)
    torch.testing.assert_close(logit.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["learned", "off_by_one"])
def test_a_logit_adds_its_exponential_to_the_sum(name):
    c = config(sink=name)
    attention = drawn(SelfAttention(c, 0))
    x = stream()

    def weights(x):
        q, k, _ = projections(attention, x)
        logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 6**0.5
        exponentials = logits.exp() * torch.ones(9, 9).tril()
        logit = attention.sink.weight if name == "learned" else torch.zeros(4)
        return exponentials / (exponentials.sum(-1, keepdim=True) + logit.exp()[:, None, None])

    def plain(x):
        v = projections(attention, x)[2].repeat_interleave(2, 2)
        return torch.einsum("bhij,bjhd->bihd", weights(x), v).flatten(2) @ attention.out.weight.T

    assert_same(lambda x: attention(x, forward_pass(c))[0], plain, attention, x)
    seen = attention(x, forward_pass(c))[1]
    torch.testing.assert_close(seen.learned_sink_mass, 1 - weights(x).sum(-1).detach())
    torch.testing.assert_close(seen.first_key_mass, weights(x)[..., 0].detach())


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("name", ["none", "learned", "off_by_one", "k_bias", "kv_bias"])
def test_every_sink_has_the_same_gradients_in_the_dense_form(name, softcap):
    model = drawn(Decoder(config(sink=name, softcap=softcap, position="alibi"), 30))
    tokens = torch.arange(18).view(2, 9)
    gradients = []
    for implementation in ("torch", "reference"):
        model.implementation = implementation
        loss = model(tokens, targets=tokens.roll(-1, 1)).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_no_sink_stands_beside_another_normaliser():
    with pytest.raises(ValueError, match="sink: expected none beside normalizer 'sigmoid'"):
        config(sink="learned", normalizer="sigmoid")
