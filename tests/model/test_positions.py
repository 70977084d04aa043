"""Position encodings against their formulas, written out number by number."""

import math

import pytest
import torch

from sinkbed.kernels import interval_mask
from sinkbed.model import Decoder
from sinkbed.model.attention import SelfAttention
from sinkbed.model.positions import POSITIONS
from tests.support.plain import assert_same, config, drawn, forward_pass, heads, projections, stream

ENCODINGS = ["rope", {"rope": {"share": 0.4}}, "none", "alibi", "sinusoidal", {"learned": {"length": 16}}]


def test_alibi_slopes_are_those_of_the_paper():
    of = lambda n_heads: POSITIONS.make("alibi", config(n_heads=n_heads)).slopes.tolist()  # noqa: E731
    assert of(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert of(16) == pytest.approx([2 ** (-n / 2) for n in range(1, 17)])
    assert of(12) == pytest.approx([*of(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])  # of 16, every other one
    assert of(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_alibi_takes_distance_times_slope_from_the_logits():
    c = config(position="alibi")
    attention, x = drawn(SelfAttention(c, 0)), stream()
    i = torch.arange(9)
    bias = torch.stack([-(2.0 ** -(2 * h)) * (i[:, None] - i) for h in (1, 2, 3, 4)])

    def plain(x):
        return heads(*projections(attention, x), bias=bias).flatten(2) @ attention.out.weight.T

    assert_same(lambda x: attention(x, forward_pass(c))[0], plain, attention, x)


@pytest.mark.parametrize(("share", "turned"), [(1.0, 10), (0.4, 4), (0.6, 6)])
def test_rope_turns_neighbouring_pairs_of_a_share_of_the_dimensions(share, turned):
    theta, positions = 50.0, [0, 1, 2, 7, 30]
    encoding = POSITIONS.make({"rope": {"theta": theta, "share": share}}, config(head_dim=10))
    x = stream(2, 5, 3, 10)

    def plain(x):
        columns = list(x.unbind(-1))
        for n in range(turned // 2):
            angle = torch.tensor([p * theta ** (-2 * n / turned) for p in positions], dtype=x.dtype)[:, None]
            a, b = x[..., 2 * n], x[..., 2 * n + 1]
            columns[2 * n] = a * angle.cos() - b * angle.sin()
            columns[2 * n + 1] = a * angle.sin() + b * angle.cos()
        return torch.stack(columns, -1)

    prepared = encoding.prepare(torch.tensor(positions))
    assert_same(lambda x: encoding.rotate(x, prepared), plain, torch.nn.Identity(), x, atol=1e-5)  # it is in float32


def test_rope_turns_an_even_part_of_an_odd_head_dim_and_keeps_the_dtype():
    x = stream(2, 5, 3, 5)
    encoding = POSITIONS.make({"rope": {"share": 0.8}}, config(head_dim=5))
    prepared = encoding.prepare(torch.arange(5))
    turned = encoding.rotate(x, prepared)
    assert turned.dtype == torch.float64 and torch.equal(turned[..., 4:], x[..., 4:])
    assert encoding.rotate(x.float(), prepared).dtype == torch.float32


@pytest.mark.parametrize("channels", [12, 13])
def test_sinusoidal_adds_sines_to_even_channels_and_cosines_to_odd_ones(channels):
    c = config(d_model=channels, init_std=0.3)
    positions = torch.tensor([[0, 1, 2], [0, 5, 90]])
    expected = [
        [
            [(math.cos if ch % 2 else math.sin)(p / 10_000 ** (ch // 2 * 2 / channels)) for ch in range(channels)]
            for p in row
        ]
        for row in positions.tolist()
    ]
    x = stream(2, 3, channels)
    for choice, scale in (("sinusoidal", 0.3), ({"sinusoidal": {"scale": 1.0}}, 1.0)):
        added = POSITIONS.make(choice, c).embed(x, positions) - x
        torch.testing.assert_close(added, scale * torch.tensor(expected, dtype=x.dtype), atol=1e-5, rtol=1e-5)


def test_learned_positions_add_their_row_of_the_table():
    encoding = drawn(POSITIONS.make({"learned": {"length": 12}}, config()))
    positions = torch.tensor([[0, 1, 2], [11, 0, 1]])
    assert encoding.max_length == 12

    def plain(x):
        return x + torch.stack([torch.stack([encoding.table.weight[p] for p in row]) for row in positions.tolist()])

    assert_same(lambda x: encoding.embed(x, positions), plain, encoding, stream(2, 3, 20))
    assert not torch.autograd.grad(encoding.embed(stream(2, 3, 20), positions).sum(), encoding.table.weight)[0][5].any()


@pytest.mark.parametrize("position", ENCODINGS, ids=str)
def test_positions_tell_the_order_of_tokens(position):
    """The last query sees the same tokens in another order; without positions, the same set of them."""
    model = drawn(Decoder(config(n_layers=1, position=position), 30))
    tokens = torch.tensor([[3, 7, 11, 2, 5]])
    a, b = (model(t).logits[0, -1] for t in (tokens, tokens[:, [1, 2, 0, 3, 4]]))
    assert torch.allclose(a, b) == (position == "none")


@pytest.mark.parametrize("position", ENCODINGS, ids=str)
def test_with_positions_by_document_a_packed_document_is_as_one_alone(position):
    start = torch.tensor([[0] * 4 + [4] * 5], dtype=torch.int32)
    end = torch.tensor([[4] * 4 + [9] * 5], dtype=torch.int32)
    mask = interval_mask(1, 9, doc_start=start, doc_end=end, document=True)
    model, tokens = drawn(Decoder(config(position=position), 30)), torch.arange(9)[None]
    packed = model(tokens, torch.arange(9)[None] - start.long(), mask).logits
    torch.testing.assert_close(packed[:, 4:], model(tokens[:, 4:]).logits, atol=1e-4, rtol=1e-4)
    by_row = model(tokens, None, mask).logits
    depends = position == "sinusoidal" or "learned" in position
    assert torch.allclose(by_row, packed, atol=1e-4, rtol=1e-4) != depends
