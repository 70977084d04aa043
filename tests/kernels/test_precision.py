"""The operator in half precision and under autocast, against the dense float64 reference."""

import pytest
import torch

from sinkbed.kernels import attention, attention_received, interval_mask
from tests.support.masks import MASKS, boundaries, inputs


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sink", [False, True])
def test_gradients_in_bfloat16(kind, sink):
    torch.manual_seed(0)
    start, end = boundaries([70, 80], rows=2)
    mask = interval_mask(2, 150, doc_start=start, doc_end=end, **MASKS[kind](start, end))
    leaves = [x.detach().bfloat16() for x in inputs(2, 4, 2, 150, 16)]
    leaves += [torch.tensor([0.5, -1.0, 2.0, 0.0]).bfloat16()] if sink else []
    weight = torch.randn(2, 4, 150, 16)

    def gradients(implementation, dtype):
        q, k, v, *logit = (x.to(dtype, copy=True).requires_grad_() for x in leaves)
        out = attention(q, k, v, mask, sink_logit=logit[0] if logit else None, implementation=implementation)
        return torch.autograd.grad(out.output, [q, k, v, *logit], weight.to(dtype))

    for ours, exact in zip(gradients("torch", torch.bfloat16), gradients("reference", torch.float64), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).norm() <= 0.01 * exact.norm()


def test_gradients_in_bfloat16_of_large_logits_are_as_near():
    """Regression: logits were rounded before the softmax, and gradients were 17 % off where all are about 128."""
    torch.manual_seed(0)
    leaves = [(x + offset).detach().bfloat16() for x, offset in zip(inputs(2, 4, 2, 150, 16), (6, 6, 0), strict=True)]
    weight = torch.randn(2, 4, 150, 16)

    def gradients(implementation, dtype):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in leaves)
        return torch.autograd.grad(
            attention(q, k, v, implementation=implementation).output, [q, k, v], weight.to(dtype)
        )

    for ours, exact in zip(gradients("torch", torch.bfloat16), gradients("reference", torch.float64), strict=True):
        assert (ours - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_sink_value_in_float32_joins_an_output_in_bfloat16(softcap):
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in inputs(1, 2, 2, 9, 16))
    sink = {"sink_logit": torch.zeros(2), "sink_value": torch.ones(2, 16, requires_grad=True), "softcap": softcap}
    for implementation in ("torch", "reference"):
        out = attention(q, k, v, **sink, implementation=implementation).output
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    assert q.grad.dtype == torch.bfloat16 and sink["sink_value"].grad.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_autocast_does_not_round_what_is_given_in_float32(implementation):
    q, k, v = (x.detach().float() for x in inputs(1, 2, 2, 9, 16))
    mask = interval_mask(1, 9, window=4)
    for scaled in (q, 1e38 * q):  # of which logits overflow, and the dense form takes over
        plain = attention(scaled, k, v, mask, implementation=implementation).output
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = attention(scaled, k, v, mask, implementation=implementation).output
        torch.testing.assert_close(cast, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bit_inputs_are_summed_in_float32(dtype):
    """Products in q's dtype gave probabilities of 1.2."""
    start, end = boundaries([90, 60])
    mask = interval_mask(1, 150, doc_start=start, doc_end=end, document=True, window=80)
    q, k, v = ((4 * x).detach().to(dtype) for x in inputs(1, 4, 2, 150, 16))
    sink = torch.tensor([0.0, 1.0, 4.0, 30.0])
    lse, statistics = attention(q, k, v, mask, sink_logit=sink, statistics=True)[1:]
    found = [lse, *(x for x in statistics if x is not None), attention_received(q, k, lse, mask)]
    exact = [x.double() for x in (q, k, v)]
    oracle = attention(*exact, mask, sink_logit=sink.double(), statistics=True, implementation="reference")
    received = attention_received(*exact[:2], oracle.lse, mask, implementation="reference")
    for ours, true in zip(found, [oracle.lse, *(x for x in oracle.statistics if x is not None), received], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true, atol=1e-3, rtol=1e-3)
