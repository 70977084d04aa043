"""Where norms stand, and how matrices are drawn."""

import pytest
import torch

from sinkbed.model import Decoder
from tests.support.plain import assert_same, config, drawn, forward_pass, stream


def pre(x, part, norm, _):
    return x + part(norm(x))


def post(x, part, norm, _):
    return norm(x + part(x))


def sandwich(x, part, norm, norm_out):
    return x + norm_out(part(norm(x)))


@pytest.mark.parametrize(("name", "join"), [("pre_norm", pre), ("post_norm", post), ("sandwich_norm", sandwich)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_stand_where_the_block_says(name, join, norm):
    model = drawn(Decoder(config(block=name, norm=norm), 30))
    block, run = model.blocks[0], forward_pass(model.config)

    def plain(x):
        x = join(x, lambda h: block.attention(h, run)[0], block.attention_norm, getattr(block, "attention_out_norm", 0))
        return join(x, block.feed_forward, block.feed_forward_norm, getattr(block, "feed_forward_out_norm", 0))

    assert_same(lambda x: block(x, run)[0], plain, block, stream())
    # Post-norm has normalised the stream by its end; the others have not.
    hidden = model.embedding(torch.arange(9)[None])
    for b in model.blocks:
        hidden = b(hidden, run)[0]
    hidden = hidden if name == "post_norm" else model.norm(hidden)
    torch.testing.assert_close(model(torch.arange(9)[None]).logits, hidden @ model.head.weight.T)
    assert ("norm.weight" in dict(model.named_parameters())) == (name != "post_norm")


@pytest.mark.parametrize("name", ["pre_norm", "post_norm", "sandwich_norm"])
def test_every_block_trains_and_counts_its_parameters(name):
    model = Decoder(config(block=name, n_layers=3), 30)
    model(torch.arange(9)[None], targets=torch.arange(1, 10)[None]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.parameter_count() == Decoder.parameters_of(model.config, 30)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("normal", dict(qkv=0.05, out=0.05, up=0.05, down=0.05)),
        ("residual_scaled", dict(qkv=0.05, out=0.05 / 2, up=0.05, down=0.05 / 2)),
        ("fan_in", dict(qkv=64**-0.5, out=128**-0.5 / 2, up=64**-0.5, down=400**-0.5 / 2)),
    ],
)
def test_matrices_are_drawn_with_the_spread_of_the_rule(rule, expected):
    shape = dict(d_model=64, n_heads=4, n_kv_heads=4, head_dim=32, d_ff=400, feed_forward="gelu")
    torch.manual_seed(0)
    model = Decoder(config(init=rule, init_std=0.05, **shape), 500)
    for block in model.blocks:
        parts = dict(qkv=block.attention.qkv, out=block.attention.out, up=block.feed_forward.up)
        for name, matrix in (parts | dict(down=block.feed_forward.down)).items():
            assert matrix.weight.std().item() == pytest.approx(expected[name], rel=0.03), name
    assert model.embedding.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert (model.blocks[0].attention_norm.weight == 1).all(), "vectors stay as made"
