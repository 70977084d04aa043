"""Which derivatives the operators have, also compiled, and which they refuse."""

import pytest
import torch
from torch.autograd import forward_ad

from sinkbed.kernels import attention, interval_mask
from tests.support.masks import inputs


@pytest.mark.parametrize("how", [{}, {"softcap": 1.5}], ids=["flash", "blocks"])
def test_lse_alone_may_be_a_loss(how):
    mask = interval_mask(1, 9, window=4)
    gradients = []
    for arguments in (how, how | {"implementation": "reference"}):
        q, k, v = inputs(1, 2, 1, 9, 8)
        torch.linspace(-1, 1, 18, dtype=q.dtype).dot(attention(q, k, v, mask, **arguments).lse.flatten()).backward()
        assert v.grad is None or not v.grad.any()
        gradients.append((q.grad, k.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("of", ["output", "slopes", "gradient"])
def test_forward_mode_derivatives_are_refused_but_by_the_reference(of):
    """Regression: they were 0, without a word."""
    q, k, v = (x.detach() for x in inputs(1, 2, 1, 9, 8))

    def derivative(implementation):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(q, q)
            own = x if of == "output" else q.clone().requires_grad_()
            slopes = x[0, :, 0, 0].exp() if of == "slopes" else None
            out = attention(own, k, v, slopes=slopes, implementation=implementation).output
            if of == "gradient":
                [out] = torch.autograd.grad((out * x).sum(), own)
            return forward_ad.unpack_dual(out).tangent

    assert derivative("reference").any()
    with pytest.raises(NotImplementedError, match=r"expected derivatives in reverse mode.*'reference' has those"):
        derivative("torch")


@pytest.mark.parametrize("laid_out_as_in_the_model", [False, True])
def test_what_the_compiler_generates_takes_inputs_of_any_layout(laid_out_as_in_the_model):
    """Regression: gradients of contiguous inputs have other strides than the operator had promised."""

    def gradients(call):
        q, k, v = (x.detach() for x in inputs(2, 4, 2, 9, 8))
        if laid_out_as_in_the_model:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(call(*leaves).output.square().sum(), leaves)

    torch.testing.assert_close(gradients(torch.compile(attention)), gradients(attention))


@pytest.mark.parametrize("how", [{}, {"softcap": 1.5}], ids=["flash", "blocks"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_breaks_no_graph(how, dynamic):
    """Regressions: statistics of a mask without documents, and a scale that is a symbol."""

    def function(q, k, v):
        out = attention(q * 2, k, v, statistics=True, **how)
        return out.output.square().sum(), out.statistics.first_key_mass

    results = []
    for call in (function, torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        q, k, v = inputs(1, 2, 1, 9, 8)
        loss, mass = call(q, k, v)
        loss.backward()
        results.append([loss.detach(), mass, q.grad, k.grad, v.grad])
    torch.testing.assert_close(*results)
