"""Softcap, ALiBi and normalisers in the Triton kernels, in Triton's interpreter against the dense float64 reference."""

import pytest
import torch

from sinkbed.kernels import attention, available, interval_mask
from sinkbed.kernels.normalizers import Normalizer
from tests.kernels.test_triton import no_override, rounded_bfloat16, small_tiles, unwritten_outputs_are_nan
from tests.support.masks import MASKS, boundaries, inputs
from tests.support.scorings import SCORINGS, scoring

__all__ = ["no_override", "rounded_bfloat16", "unwritten_outputs_are_nan"]

pytestmark = pytest.mark.skipif(
    "triton" not in available("cpu"), reason="the kernels run on a CPU in Triton's interpreter only"
)
LENGTHS = [5, 1, 18, 9]


def values(implementation, dtype, mask, q, k, v, sink_logit=None, **arguments):
    """Output, statistics, lse where there is one, and gradients, by name."""
    tensors = {"q": q, "k": k, "v": v} | ({} if sink_logit is None else {"sink": sink_logit})
    tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    q, k, v, *sink = tensors.values()
    sink_logit = sink[0] if sink else None
    out = attention(q, k, v, mask, sink_logit=sink_logit, statistics=True, implementation=implementation, **arguments)
    assert (out.lse is None) == (arguments["normalizer"] is not None)
    assert (out.statistics.row_sum is None) == (out.lse is not None and not sink)
    measured = {"output": out.output, "lse": out.lse, **out.statistics._asdict()}
    loss = (out.output * torch.linspace(-1, 1, out.output.numel()).view_as(out.output).to(dtype)).sum()
    if out.lse is not None:
        loss = loss + out.lse.square().sum()
    loss.backward()
    measured |= {f"d{name}": x.grad for name, x in tensors.items()}
    return {name: x.detach().double() for name, x in measured.items() if x is not None}


def errors(values, expected):
    """Largest deviation over the largest value, which counts as 0.1 at least, a tensor each; NaN where there is one."""
    assert values.keys() == expected.keys()
    return {n: float((values[n] - x).abs().max() / x.abs().max().clamp_min(0.1)) for n, x in expected.items()}


def assert_equal(values, expected):
    found = errors(values, expected)
    assert all(x < 2e-5 for x in found.values()), found


CASES = list(zip(SCORINGS, list(MASKS)[1:], (1, 2) * 6, strict=False))


def test_every_scoring_and_mask_is_in_a_case():
    assert len(CASES) == len(SCORINGS) == len(MASKS) - 1


@pytest.mark.parametrize(("name", "mask_name", "groups"), CASES)
def test_values_statistics_and_gradients_equal_the_float64_reference(name, mask_name, groups):
    start, end = boundaries(LENGTHS)
    mask = interval_mask(1, 33, doc_start=start, doc_end=end, **MASKS[mask_name](start, end))
    tensors, arguments = inputs(1, 2, 2 // groups, 33, 16), scoring(**SCORINGS[name])
    small_tiles()
    assert_equal(
        values("triton", torch.float32, mask, *tensors, **arguments),
        values("reference", torch.float64, mask, *tensors, **arguments),
    )


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize("name", ["softcap, ALiBi", "sigmoid", "elu, normalized", "softpick"])
def test_tiles_without_a_mask_and_of_unequal_sides(monkeypatch, name, wgmma):
    """A causal row of one document: the distance of ALiBi counts from the tile's own first key. In both forms."""
    monkeypatch.setattr("sinkbed.kernels.triton.op._wgmma", lambda: wgmma)
    tensors, arguments = inputs(1, 2, 1, 65, 16), scoring(**SCORINGS[name])
    small_tiles(32, 16)
    assert_equal(
        values("triton", torch.float32, None, *tensors, **arguments),
        values("reference", torch.float64, None, *tensors, **arguments),
    )


@pytest.mark.parametrize("name", ["softpick, softcap, ALiBi", "sigmoid, softcap, ALiBi"])
@pytest.mark.parametrize("T", [1, 17])
def test_any_length(name, T):
    tensors, arguments = inputs(1, 2, 1, T, 32), scoring(**SCORINGS[name])
    assert_equal(
        values("triton", torch.float32, None, *tensors, **arguments),
        values("reference", torch.float64, None, *tensors, **arguments),
    )


def test_a_learned_sink_joins_capped_logits_as_it_is():
    start, end = boundaries(LENGTHS)
    mask = interval_mask(1, 33, doc_start=start, doc_end=end, document=True)
    tensors, arguments = inputs(1, 2, 1, 33, 16), scoring(**SCORINGS["softcap, ALiBi"])
    found, expected = (
        values(implementation, dtype, mask, *tensors, torch.tensor([3.0, -1.0]), **arguments)
        for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert "learned_sink_mass" in found and "dsink" in found
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["softcap, ALiBi", "sigmoid", "softpick"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_errs_no_more_than_an_ordinary_run(rounded_bfloat16, name, dtype):
    start, end = boundaries([9, 24])
    mask = interval_mask(1, 33, doc_start=start, doc_end=end, document=True)
    tensors, arguments = [x.to(dtype) for x in inputs(1, 2, 1, 33, 16)], scoring(**SCORINGS[name])
    expected = values("reference", torch.float64, mask, *tensors, **arguments)
    ordinary = errors(values("reference", dtype, mask, *tensors, **arguments), expected)
    found = errors(values("triton", dtype, mask, *tensors, **arguments), expected)
    assert all(x <= max(1.5 * ordinary[n], 2e-3) for n, x in found.items()), (found, ordinary)


@pytest.mark.parametrize("name", ["softcap", "sigmoid, normalized", "elu, normalized", "softpick"])
def test_large_logits_overflow_nowhere(name):
    """exp(1000) does: the row's maximum, the cap and the sigmoid each keep it away."""
    q, k, v = inputs(1, 2, 1, 17, 16)
    tensors, arguments = [x.float() for x in (q * 300, k, v)], scoring(**SCORINGS[name])
    assert torch.einsum("bhid,bhjd->bhij", q * 300, k.expand(1, 2, -1, -1)).abs().max() > 2000
    found = values("triton", torch.float32, None, *tensors, **arguments)
    expected = values("reference", torch.float64, None, *tensors, **arguments)
    for measured in ("output", "first_key_mass"):
        assert errors(found, expected)[measured] < 5e-3
    assert all(x.isfinite().all() for x in found.values())


def test_a_query_that_softpick_gives_nothing_is_zero():
    q, k = torch.full((1, 1, 4, 16), 9.0), torch.full((1, 1, 4, 16), -9.0)
    found = values("triton", torch.float32, None, q, k, torch.ones(1, 1, 4, 16), **scoring(normalizer="softpick"))
    assert all(float(x.abs().max()) == 0 for x in found.values())


def test_torch_compile_sees_one_operator_and_breaks_no_graph():
    def function(q, k, v):
        out = attention(q * 2, k, v, statistics=True, implementation="triton", **arguments)
        return (out.output * 3).sum(), out.statistics.row_sum

    arguments = scoring(**SCORINGS["sigmoid, softcap, ALiBi"])
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        q, k, v = inputs(1, 2, 1, 21, 16, torch.float32)
        loss, row_sum = call(q, k, v)
        loss.backward()
        results.append([loss.detach(), row_sum, q.grad, k.grad, v.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_operator_passes_opcheck():
    q, k, v = inputs(1, 2, 1, 21, 16, torch.float32)
    slopes = torch.tensor([0.5, 0.25])
    arguments = (q, k, v, *[None] * 7, slopes, 0, 0, 0.25, 2.0, "sigmoid", True, -1.0, 1e-8, True)
    torch.library.opcheck(torch.ops.sinkbed.attention_triton.default, arguments)


def test_a_normaliser_that_the_kernels_lack_is_refused_by_name():
    class Cosine(Normalizer):
        def weights(self, logits):
            return logits.exp().cos()

    q, k, v = inputs(1, 2, 2, 8, 16, torch.float32)
    with pytest.raises(ValueError, match="normalizer Cosine: expected implementation 'reference'"):
        attention(q, k, v, normalizer=Cosine(), implementation="triton")


def test_a_decoder_on_the_kernels_equals_one_on_the_reference():
    from sinkbed.model import Decoder, DecoderConfig

    config = DecoderConfig(
        n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, position="alibi", normalizer="softpick"
    )
    tokens = torch.randint(50, (1, 34), generator=torch.Generator().manual_seed(0))
    results = []
    for implementation in ("triton", "reference"):
        torch.manual_seed(0)
        decoder = Decoder(config, 50)
        decoder.implementation = implementation
        out = decoder(tokens[:, :-1], targets=tokens[:, 1:], statistics=True)
        out.loss.backward()
        measured = {name: p.grad for name, p in decoder.named_parameters()} | {"loss": out.loss.detach()}
        results.append(measured | {"row_sum": out.statistics[0].row_sum})
    assert_equal(*results)
