"""The decoder against plain definitions; packing inside the whole model."""

import pytest
import torch
import torch.nn.functional as F

from sinkbed.kernels import interval_mask
from sinkbed.model import Decoder, DecoderConfig, observe
from sinkbed.model.feed_forward.swiglu import SwiGLU
from sinkbed.model.norms.rms import RMSNorm
from sinkbed.model.positions.rope import rotate, rotations

SMALL = dict(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2)


def small(**changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{**SMALL, **changes}), vocab_size=50)


def test_rmsnorm_and_its_gradients_equal_the_definition():
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 16, dtype=torch.float64)
    (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight).backward(upstream)
    norm = RMSNorm(DecoderConfig(n_layers=1, d_model=16, n_heads=1, d_ff=1))
    with torch.no_grad():
        norm.weight.copy_(weight)
    ours = x.detach().float().requires_grad_()
    norm(ours).backward(upstream.float())
    torch.testing.assert_close(ours.grad.double(), x.grad, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, atol=5e-6, rtol=5e-6)


def test_swiglu_and_its_gradients_equal_the_definition():
    layer = SwiGLU(DecoderConfig(n_layers=1, d_model=8, n_heads=1, d_ff=12)).double()
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    gate, up = (x @ layer.gate_up.weight.T).chunk(2, -1)
    expected = (gate * torch.sigmoid(gate) * up) @ layer.down.weight.T
    grads = torch.autograd.grad(expected.sum(), [x, *layer.parameters()])
    ours = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    torch.testing.assert_close(layer(x), expected)
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b)


def test_rotation_depends_on_the_distance_of_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)
    dots = [
        (rotate(q, rotations(torch.tensor([a]), 16, 100.0)) * rotate(k, rotations(torch.tensor([b]), 16, 100.0))).sum()
        for a, b in [(7, 3), (104, 100), (5, 3)]
    ]
    torch.testing.assert_close(dots[0], dots[1], atol=1e-4, rtol=1e-4)
    assert (dots[0] - dots[2]).abs() > 1e-3


def packed_layout():
    lengths = [5, 1, 9]
    start = torch.tensor([[0] * 5 + [5] + [6] * 9], dtype=torch.int32)
    end = torch.tensor([[5] * 5 + [6] + [15] * 9], dtype=torch.int32)
    mask = interval_mask(1, 15, doc_start=start, doc_end=end, document=True)
    return lengths, mask, torch.arange(15)[None] - start.long()


@pytest.mark.parametrize("document_positions", [False, True])
def test_packed_logits_and_gradients_equal_those_of_separate_documents(document_positions):
    lengths, mask, positions = packed_layout()
    tokens = torch.randint(50, (1, 15))
    packed, separate = small(), small()
    # Rotary positions are relative, so counting along the row or the document gives the same model.
    logits = packed(tokens, positions if document_positions else None, mask).logits
    F.cross_entropy(logits[0], tokens[0].roll(-1), reduction="sum").backward()
    pieces = [separate(t).logits for t in tokens.split(lengths, dim=1)]
    joined = torch.cat(pieces, dim=1)
    F.cross_entropy(joined[0], tokens[0].roll(-1), reduction="sum").backward()
    torch.testing.assert_close(logits, joined, atol=2e-5, rtol=2e-5)
    for a, b in zip(packed.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


def test_a_token_of_one_document_changes_nothing_in_another():
    _, mask, positions = packed_layout()
    model, tokens = small(), torch.randint(50, (1, 15))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    with torch.no_grad():
        a, b = model(tokens, positions, mask).logits, model(changed, positions, mask).logits
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("sink", ["none", "learned", "off_by_one"])
def test_every_sink_option_trains_and_reports_its_mass(sink):
    model = small(sink=sink)
    tokens = torch.randint(50, (2, 8))
    out = model(tokens, statistics=True)
    out.logits.sum().backward()
    masses = [s.learned_sink_mass for s in out.statistics]
    assert len(masses) == 2
    if sink == "none":
        assert masses == [None, None]
    else:
        assert all(0 < m.mean() < 1 for m in masses)
    logits = [p for n, p in model.named_parameters() if n.endswith("sink.weight")]
    assert len(logits) == (2 if sink == "learned" else 0)
    assert all(p.grad.abs().sum() > 0 for p in logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_heads=5, n_kv_heads=None), "d_model: expected a multiple of n_heads=5"),
        (dict(n_kv_heads=3), "n_kv_heads: expected a divisor of n_heads=4"),
        (dict(n_layers=0), "n_layers: expected an integer of at least 1"),
        (dict(init_std=0), "init_std: expected more than 0"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("demo", 0.15e6, 0.25e6), ("60m", 50e6, 110e6), ("120m", 110e6, 140e6), ("1b", 0.9e9, 1.2e9)],
)
def test_the_shipped_shapes_have_the_size_in_their_name(name, low, high):
    import yaml

    vocab = 512 if name == "demo" else 50_432 if name == "60m" else 32_000
    with open(f"configs/model/{name}.yaml") as file, torch.device("meta"):
        model = Decoder(DecoderConfig(**yaml.safe_load(file)["model"]["decoder"]), vocab)
    assert low < model.parameter_count() < high


def test_a_gradient_of_the_gradients_is_refused_and_never_wrong():
    """The forms by hand took their own gradients for constants."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24), 30)
    decoder.implementation = "reference"
    tokens = torch.arange(10)[None]
    loss = decoder(tokens, targets=tokens).loss
    gradient, *_ = torch.autograd.grad(loss, list(decoder.parameters()), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), list(decoder.parameters()))


def test_targets_beside_next_tokens_are_refused():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="targets: expected none beside next_tokens, got both"):
        Decoder(DecoderConfig(n_layers=1, d_model=32, n_heads=2, d_ff=48), 17)(
            tokens, targets=tokens, next_tokens=tokens
        )


def test_rotary_positions_need_an_even_head_dim():
    with pytest.raises(ValueError, match="rope: expected an even number of dimensions"):
        Decoder(DecoderConfig(**{**SMALL, "head_dim": 7, "position": {"rope": {"theta": 500.0}}}), 30)
    Decoder(DecoderConfig(**{**SMALL, "head_dim": 7, "position": "none"}), 30)


def test_a_part_of_attention_stands_once():
    with pytest.raises(ValueError, match="attention_parts: expected each once, got qk_norm, v_bias, qk_norm"):
        DecoderConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, attention_parts=["qk_norm", "v_bias", "qk_norm"])


def test_column_sums_are_taken_by_the_implementation_of_the_pass(monkeypatch):
    decoder, layers, used = small(), [], []
    taken = observe.attention_received
    monkeypatch.setattr(
        observe, "attention_received", lambda *a, **o: used.append(o["implementation"]) or taken(*a, **o)
    )
    with torch.no_grad(), observe.observing(decoder, attention=layers.append):
        for decoder.implementation in ("reference", None):
            decoder(torch.zeros(1, 6, dtype=torch.int64))
    for layer in layers:
        layer.received()
    assert used == ["reference", "reference", None, None]
