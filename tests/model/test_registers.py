"""Registers: vectors before every row that every query sees, and that nothing measured counts as tokens."""

import pytest
import torch

from sinkbed.kernels import interval_mask
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.observe import observing

SHAPE = dict(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.3)
TOKENS = torch.arange(40).view(2, 20) % 37


def decoder(**parts):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**SHAPE, **parts), 40)


def test_they_are_what_tokens_with_such_embeddings_would_be():
    """Without positions that are relative, a register is a token whose embedding is its vector."""
    ours = decoder(n_registers=2, position="none")
    plain = decoder(position="none")
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "registers"})
    with torch.no_grad():
        plain.embedding.weight[38:] = ours.registers
    prefixed = torch.cat([torch.tensor([[38, 39]]).expand(2, -1), TOKENS], dim=1)
    torch.testing.assert_close(ours(TOKENS).logits, plain(prefixed).logits[:, 2:])


@pytest.mark.parametrize("sink", ["none", "kv_bias"])
@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_what_is_measured_is_attention_of_tokens_on_tokens(position, sink):
    model = decoder(n_registers=3, position=position, sink=sink)
    layers, widths = [], []
    with torch.no_grad(), observing(model, attention=layers.append, hidden=lambda _, h: widths.append(h.shape[1])):
        output = model(TOKENS, statistics=True)
    assert output.logits.shape == (2, 20, 40) and set(widths) == {20}
    for layer, measured in zip(layers, output.statistics, strict=True):
        weights = torch.cat([block for _, block in layer.blocks(7)], dim=2)
        assert weights.shape == (2, 4, 20, 20) and measured.learned_sink_mass.min() > 0
        torch.testing.assert_close(weights[..., 0], measured.first_key_mass)
        torch.testing.assert_close(measured.first_key_mass, measured.document_mass)
        torch.testing.assert_close(weights.sum(-1), measured.row_sum)
        sums = measured.row_sum + measured.learned_sink_mass
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_what_is_measured_has_no_gradient():
    """Regression: their statistics kept a T×T matrix for a backward pass."""
    for measured in decoder(n_registers=3, sink="kv_bias")(TOKENS, statistics=True).statistics:
        assert not any(x.requires_grad for x in measured if x is not None)


def test_every_document_sees_them_and_no_other_document():
    model = decoder(n_registers=3)
    start = torch.tensor([[0] * 8 + [8] * 12] * 2, dtype=torch.int32)
    mask = interval_mask(2, 20, doc_start=start, document=True)
    with torch.no_grad():
        packed = model(TOKENS, mask=mask).logits
        torch.testing.assert_close(packed[:, :8], model(TOKENS[:, :8]).logits)
        alone = model(TOKENS[:, 8:], torch.arange(8, 20)).logits
        torch.testing.assert_close(packed[:, 8:], alone)
        without = model(TOKENS[:, 8:], torch.arange(8, 20), interval_mask(2, 12, hide_first_key=True)).logits
    assert not torch.allclose(without[:, 1:], alone[:, 1:])
    measured = model(TOKENS, mask=mask, statistics=True).statistics[0]
    assert (measured.first_key_mass[..., 8:] == 0).all() and (measured.document_mass[..., 8:] > 0).all()


def test_a_loss_is_differentiated_by_the_states_of_tokens():
    model, states = decoder(n_registers=2), []
    with observing(model, hidden=lambda _, h: states.append(h)):
        loss = model(TOKENS[:, :-1], targets=TOKENS[:, 1:]).loss
    assert all(g.shape == (2, 19, 32) and g.norm() > 0 for g in torch.autograd.grad(loss, states))


def test_a_shared_prefix_whose_first_key_is_hidden_is_refused():
    mask = interval_mask(2, 20, window=4, shared_prefix=3, hide_first_key=True)
    with pytest.raises(ValueError, match="registers: expected no shared prefix where key 0 is hidden, got one of 3"):
        decoder(n_registers=2)(TOKENS, mask=mask)


def test_they_learn():
    model = decoder(n_registers=2)
    model(TOKENS[:, :-1], targets=TOKENS[:, 1:]).loss.backward()
    assert (model.registers.grad.norm(dim=1) > 0).all()
    assert model.parameter_count() == decoder().parameter_count() + 2 * 32


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_mass_on_them_is_a_mass(autocast):
    """Their logits were rounded to bfloat16 beside an lse in float32: masses of 1.08, shares of −1.8."""
    model = decoder(n_registers=2) if autocast else decoder(n_registers=2).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for block in model.blocks:
            block.attention.qkv.weight *= 3
        measured = model(TOKENS, statistics=True).statistics
    for layer in measured:
        total = layer.learned_sink_mass + layer.row_sum
        torch.testing.assert_close(total, torch.ones_like(total), atol=0.01, rtol=0)
        share = layer.first_key_mass / layer.row_sum
        torch.testing.assert_close(share[..., 0], torch.ones_like(share[..., 0]))
        assert share.max() < 1.001
