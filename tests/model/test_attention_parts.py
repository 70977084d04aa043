"""Gates, norms of heads and biases of attention against their formulas."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.attention import SelfAttention
from sinkbed.model.norms.rms import head_rms_norm
from tests.support.plain import assert_same, config, drawn, forward_pass, heads, projections, stream


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def qk_norm(part, x, q, k, v):
    return heads(rms(q, part.query_weight), rms(k, part.key_weight), v)


def head_norm(part, x, q, k, v):
    return rms(heads(q, k, v), part.weight)


def output_gate(part, x, q, k, v):
    gate = torch.sigmoid(x[..., : part.gate.weight.shape[1]] @ part.gate.weight.T)
    return heads(q, k, v) * gate.view(*x.shape[:2], 4, -1)


def v_bias(part, x, q, k, v):
    return heads(q, k, v) + part.bias.view(4, 6)


def value_gate(part, x, q, k, v):
    return heads(q, k, v * torch.sigmoid(x @ part.gate.weight.T).view_as(v))


PARTS = [
    ("qk_norm", qk_norm, {"query_weight": (6,), "key_weight": (6,)}),
    ("head_norm", head_norm, {"weight": (6,)}),
    ("output_gate", output_gate, {"gate.weight": (24, 20)}),
    ({"output_gate": {"per": "head"}}, output_gate, {"gate.weight": (4, 20)}),
    ({"output_gate": {"per": "head", "inputs": 5}}, output_gate, {"gate.weight": (4, 5)}),
    ("v_bias", v_bias, {"bias": (24,)}),
    ("value_gate", value_gate, {"gate.weight": (12, 20)}),
]


def test_in_autocast_qk_norm_leaves_queries_in_the_dtype_of_values(request):
    """Regression: on GPUs, where autocast takes `rms_norm` in float32, attention refused its queries."""
    model = Decoder(DecoderConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, attention_parts=["qk_norm"]), 40)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(12)[None], targets=torch.arange(12)[None]).loss.backward()
    torch.set_autocast_enabled("cuda", True)  # which `torch.autocast` would not do without a GPU
    request.addfinalizer(lambda: torch.set_autocast_enabled("cuda", False))
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode():
        x = torch.empty(1, 5, 2, 8, dtype=torch.bfloat16, device="cuda")
        assert head_rms_norm(x, torch.ones(2, 8, device="cuda"), 1e-5).dtype == torch.bfloat16


def test_value_residual_takes_more_layers_than_one():
    with pytest.raises(ValueError, match="expected more layers than one beside value_residual"):
        Decoder(DecoderConfig(n_layers=1, d_model=8, n_heads=2, d_ff=8, attention_parts=["value_residual"]), 20)


@pytest.mark.parametrize(("choice", "formula", "shapes"), PARTS, ids=[str(part[0]) for part in PARTS])
@pytest.mark.parametrize("fused", [True, False], ids=["as on a CPU", "as elsewhere"])
def test_a_part_is_its_formula(choice, formula, shapes, fused, monkeypatch):
    monkeypatch.setattr("sinkbed.model.norms.rms.is_eager_cpu", lambda x: fused)
    c = config(attention_parts=[choice])
    attention = drawn(SelfAttention(c, 0))
    [part] = attention.parts
    assert {name: tuple(p.shape) for name, p in part.named_parameters()} == shapes

    def plain(x):
        return formula(part, x, *projections(attention, x)).flatten(2) @ attention.out.weight.T

    assert_same(lambda x: attention(x, forward_pass(c))[0], plain, attention, stream())


def test_parts_act_in_the_order_of_the_list():
    x = stream()
    for order in (("v_bias", "head_norm"), ("head_norm", "v_bias")):
        attention = drawn(SelfAttention(config(attention_parts=order), 0))
        output = heads(*projections(attention, x))
        for name, part in zip(order, attention.parts, strict=True):
            output = output + part.bias.view(4, 6) if name == "v_bias" else rms(output, part.weight)
        expected = output.flatten(2) @ attention.out.weight.T
        torch.testing.assert_close(attention(x, forward_pass(attention.config))[0], expected)


def test_value_residual_mixes_in_the_values_of_the_first_layer():
    c = config(attention_parts=["value_residual"], n_layers=3)
    layers = torch.nn.ModuleList(SelfAttention(c, layer) for layer in range(3))
    assert [[*part.parameters()] for part in layers[0].parts] == [[]] and layers[2].parts[0].share.item() == 0.5
    drawn(layers)

    def ours(x):
        run = forward_pass(c)
        for attention in layers:
            x = attention(x, run)[0]
        return x

    def plain(x):
        first = None
        for attention in layers:
            q, k, v = projections(attention, x)
            first = v if first is None else first
            share = 0.0 if attention is layers[0] else attention.parts[0].share
            x = heads(q, k, (1 - share) * v + share * first).flatten(2) @ attention.out.weight.T
        return x

    assert_same(ours, plain, layers, stream(), atol=1e-9)


def test_value_residual_is_the_same_with_activation_checkpointing():
    torch.manual_seed(0)
    model = Decoder(config(attention_parts=["value_residual"], n_layers=3, position="rope"), 30)
    tokens = torch.arange(18).view(2, 9)
    gradients = []
    for model.checkpoint_activations in (False, True):
        loss = model(tokens, targets=tokens.roll(-1, 1)).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b) and a.any()
