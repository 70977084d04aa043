"""Scores and normalisers beyond the plain softmax: blocks of queries against the dense definition, in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sinkbed.kernels import attention, blockwise, interval_mask
from sinkbed.kernels.normalizers import NORMALIZERS, Normalizer
from tests.support.masks import MASKS, boundaries, inputs

B, H, T, D = 3, 4, 23, 6


class Shifted(torch.nn.Module, Normalizer):
    """A normaliser with weights of its own."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.linspace(-1, 1, H, dtype=torch.float64)[:, None, None])

    def weights(self, logits):
        return (logits + self.shift).sigmoid()


def normalizer(choice):
    return dict(normalizer=NORMALIZERS.make(choice, H))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)
SCORINGS = {
    "softcap": lambda: dict(softcap=0.7),
    "slopes": lambda: dict(slopes=SLOPES),
    "sink a query": lambda: dict(sink_logit=drawn(B, H, T)),
    "sink a query, value": lambda: dict(sink_logit=drawn(B, H, T), sink_value=drawn(H, D)),
    "sink a head, value": lambda: dict(sink_logit=drawn(H), sink_value=drawn(H, D)),
    "softcap, slopes, sink a query, value": lambda: dict(
        softcap=0.7, slopes=SLOPES, sink_logit=drawn(B, H, T), sink_value=drawn(H, D)
    ),
    "sigmoid": lambda: normalizer("sigmoid"),
    "sigmoid, bias": lambda: normalizer({"sigmoid": {"bias": -2.0}}),
    "sigmoid, normalized": lambda: normalizer({"sigmoid": {"normalized": True}}),
    "elu": lambda: normalizer("elu"),
    "elu, normalized": lambda: normalizer({"elu": {"normalized": True}}),
    "softpick": lambda: normalizer("softpick"),
    "softpick, softcap, slopes": lambda: dict(**normalizer("softpick"), softcap=0.7, slopes=SLOPES),
    "weights of its own": lambda: dict(normalizer=Shifted()),
    "weights of its own, softcap": lambda: dict(normalizer=Shifted(), softcap=0.7),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_blocks_equal_the_dense_definition(name, scoring, monkeypatch):
    monkeypatch.setattr(blockwise, "_QUERIES", 5)
    monkeypatch.setattr(blockwise, "_BLOCK_LOGITS", 2 * H * T * 5)
    assert len(list(blockwise._blocks(torch.empty(B, H, T, D), interval_mask(B, T)))) == 2 * 5, "several of each"
    start, end = boundaries([5, 1, 1, 12, 4], rows=B)
    mask = interval_mask(B, T, doc_start=start, doc_end=end, **MASKS[name](start, end))

    def run(implementation):
        q, k, v = inputs(B, H, H // 2, T, D)
        options = SCORINGS[scoring]()
        out = attention(q, k, v, mask, statistics=True, implementation=implementation, **options)
        weight = torch.linspace(-1, 1, out.output.numel(), dtype=torch.float64).view_as(out.output)
        total = (out.output * weight).sum()
        if out.lse is not None:
            total = total + (out.lse * weight[..., 0].cos()).sum()
        own = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        own += [p for x in options.values() if isinstance(x, torch.nn.Module) for p in x.parameters()]
        gradients = torch.autograd.grad(total, [q, k, v, *own])
        return [out.output, *gradients, *(x for x in (out.lse, *out.statistics) if x is not None)]

    ours, dense = run("torch"), run("reference")
    assert len(ours) == len(dense)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_weights_that_are_kept_give_the_gradients_of_those_that_are_computed_again(monkeypatch):
    def gradients(longest):
        monkeypatch.setattr(blockwise, "_KEPT", longest)
        q, k, v = inputs(B, H, H // 2, T, D, torch.float32)
        out = attention(q, k, v, slopes=SLOPES.float(), implementation="torch")
        return torch.autograd.grad(out.output.square().sum() + out.lse.sum(), [q, k, v])

    for kept, again in zip(gradients(T), gradients(T - 1), strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("scoring", ["softcap", "slopes", "sigmoid", "softpick", "weights of its own"])
def test_what_is_measured_is_what_the_definition_says(scoring):
    """First key, first key of the document and sum of a query's weights, each from a weight that is computed here."""
    start, end = boundaries([9, 14], rows=B)
    mask = interval_mask(B, T, doc_start=start, doc_end=end)
    q, k, v = inputs(B, H, H, T, D)
    options = SCORINGS[scoring]()
    logits = q @ k.mT / D**0.5
    if "softcap" in options:
        logits = 0.7 * torch.tanh(logits / 0.7)
    if "slopes" in options:
        logits = logits + SLOPES[:, None, None] * (torch.arange(T) - torch.arange(T)[:, None])
    logits = logits.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    if scoring == "softpick":
        options["normalizer"].eps = 0.0  # the paper's code has it, its formula does not
        excess = logits.exp() - 1
        size = excess.abs().masked_fill(logits == -torch.inf, 0).sum(-1, keepdim=True)
        weights = excess.relu() / size
    elif "normalizer" in options:
        weights = (logits + getattr(options["normalizer"], "shift", 0)).sigmoid()
    else:
        weights = logits.softmax(-1)
    out = attention(q, k, v, mask, statistics=True, implementation="torch", **options)
    torch.testing.assert_close(out.output, weights @ v, atol=1e-10, rtol=1e-10)
    seen = out.statistics
    torch.testing.assert_close(seen.first_key_mass, weights[..., 0], atol=1e-10, rtol=1e-10)
    at_start = torch.stack([weights[:, :, i, int(start[0, i])] for i in range(T)], -1)
    torch.testing.assert_close(seen.document_mass, at_start, atol=1e-10, rtol=1e-10)
    if "normalizer" in options:
        torch.testing.assert_close(seen.row_sum, weights.sum(-1), atol=1e-10, rtol=1e-10)
        assert out.lse is None
    else:
        assert seen.row_sum is None


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator has made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("scoring", ["softcap", "slopes", "sigmoid", "elu, normalized", "softpick"])
@pytest.mark.parametrize("document", [False, True])
def test_no_matrix_of_all_queries_and_keys_is_made(scoring, document):
    length = 512
    start, end = boundaries([200, 312])
    mask = interval_mask(1, length, doc_start=start, doc_end=end, document=document)

    def largest(implementation):
        q, k, v = inputs(1, H, 1, length, 2, torch.float32)
        with Largest() as mode:
            out = attention(q, k, v, mask, statistics=True, implementation=implementation, **SCORINGS[scoring]())
            out.output.sum().backward()
        return mode.elements

    assert largest("torch") <= H * 64 * length < length**2 <= largest("reference")


@pytest.mark.parametrize("logit", [10.0, 17.0, 25.0])
@pytest.mark.parametrize("scoring", [{}, {"softcap": 30.0}])
def test_a_sink_that_takes_nearly_all_leaves_the_shares_of_tokens_as_they_were(logit, scoring):
    """1 − its mass lost them in float32, and with it the output of the tokens."""
    q, k, v = (x.detach() for x in inputs(2, H, 2, 40, 8, torch.float32))
    plain = attention(q, k, v, statistics=True, **scoring)
    for implementation in ("torch", "reference"):
        sink = torch.full((H,), logit)
        out = attention(q, k, v, sink_logit=sink, statistics=True, implementation=implementation, **scoring)
        assert out.statistics.learned_sink_mass.min() > 0.9
        share = out.statistics.first_key_mass / out.statistics.row_sum
        torch.testing.assert_close(share, plain.statistics.first_key_mass, atol=1e-4, rtol=1e-4)
        scale = out.statistics.row_sum[..., None]
        torch.testing.assert_close(out.output / scale, plain.output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [30, 300])
@pytest.mark.parametrize("scoring", ["softcap", "sigmoid, normalized", "elu, normalized", "softpick"])
def test_large_logits_overflow_nowhere(scoring, scale):
    """Logits of up to 1,000 and more, whose exponentials float32 does not hold; outputs and gradients."""

    def run(dtype, implementation):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs(2, H, 1, 200, 16))
        out = attention(q * scale, k, v, implementation=implementation, **SCORINGS[scoring]()).output
        return [out, *torch.autograd.grad((out.double() * out.double().detach().cos()).sum(), (q, k, v))]

    exact = run(torch.float64, "reference")
    ours, dense = run(torch.float32, "torch"), run(torch.float32, "reference")
    for a, b, expected in zip(ours, dense, exact, strict=True):
        error, allowed = ((x - expected).norm() / expected.norm().clamp_min(1e-6) for x in (a, b))
        assert error < 2 * allowed + 1e-5, (error, allowed)


def gradients(scoring, dtype, implementation, scale=4):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs(1, H, 1, 600, 16))
    out = attention(q * scale, k, v, implementation=implementation, **SCORINGS[scoring]()).output
    return [out, *torch.autograd.grad((out.double() * out.double().detach().cos()).sum(), (q, k, v))]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("scoring", ["sigmoid, normalized", "elu, normalized", "softpick"])
def test_half_precision_costs_no_more_than_its_digits(scoring, dtype, allowed):
    exact = gradients(scoring, torch.float64, "reference")
    for ours, expected in zip(gradients(scoring, dtype, "torch"), exact, strict=True):
        assert ours.dtype == dtype and (ours - expected).norm() < allowed * expected.norm()


@pytest.mark.parametrize("scoring", ["elu, normalized", "softpick"])
def test_sums_of_weights_may_leave_the_range_of_float16(scoring):
    q, k, v = ((x.detach().abs() * 8).half().double() for x in inputs(1, H, 1, 600, 16))
    total = SCORINGS[scoring]()["normalizer"].linearized(q @ k.mT / 4).total
    assert total.max() > torch.finfo(torch.float16).max
    out = attention(q.half(), k.half(), v.half(), implementation="torch", **SCORINGS[scoring]()).output
    exact = attention(q, k, v, implementation="reference", **SCORINGS[scoring]()).output
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("scoring", ["softcap", "softpick", "sigmoid, normalized"])
def test_autocast_changes_nothing(scoring):
    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return gradients(scoring, torch.bfloat16, "torch")

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_in_bfloat16_blocks_err_as_the_fused_kernel_does():
    """Logits were rounded to bfloat16 before the softmax: seven times the error."""
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 256, 64, torch.float32))
    exact = attention(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), implementation="reference")
    errors = [
        (attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **scoring).output - exact.output).square().mean().sqrt()
        for scoring in ({}, {"slopes": torch.zeros(2)})
    ]
    assert errors[1] < 1.5 * errors[0]


def test_a_normaliser_whose_weights_would_not_be_trained_is_refused():
    with pytest.raises(TypeError, match=r"Late: expected nn\.Module before Normalizer"):

        class Late(Normalizer, torch.nn.Module):
            pass


def test_a_frozen_normaliser_and_slopes_that_would_learn():
    q, k, v = inputs(1, H, H, 9, 6)
    frozen = Shifted().requires_grad_(False)
    attention(q, k, v, normalizer=frozen).output.sum().backward()
    assert frozen.shift.grad is None and q.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="slopes: expected a tensor without a gradient"):
        attention(q, k, v, slopes=drawn(H))
    for option in ({"softpick": {"eps": 0.0}}, {"sigmoid": {"bias": float("nan")}}):
        with pytest.raises(ValueError, match=r"model.decoder.normalizer.\w+.\w+: expected"):
            NORMALIZERS.make(option, H)
