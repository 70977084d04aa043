"""The blockwise loss against PyTorch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import sinkbed.model.loss as loss_module
from sinkbed.model.loss import IGNORED, linear_cross_entropy


@pytest.mark.parametrize("block", [2**25, 11 * 3, 1])
def test_loss_and_gradients_equal_cross_entropy(block, monkeypatch):
    monkeypatch.setattr(loss_module, "BLOCK_LOGITS", block)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    targets = torch.randint(11, (10,))
    targets[[2, 9]] = IGNORED
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED)
    expected_grads = torch.autograd.grad(2 * expected, [hidden, weight])
    loss = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(2 * loss, [hidden, weight])
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (grads[0][[2, 9]] == 0).all()


@pytest.mark.parametrize(
    ("vocab_size", "device", "rows"),
    [(512, "cpu", 4096), (4096, "cpu", 512), (32768, "cpu", 512), (200_000, "cpu", 167), (2**26, "cpu", 1),
     (4096, "meta", 8192)],
)  # fmt: skip
def test_a_block_is_small_on_a_cpu_and_never_of_too_many_logits(vocab_size, device, rows):
    assert loss_module._rows(torch.empty(16384, 4, device=device), vocab_size) == rows


def test_compiled_for_a_cpu_the_logits_are_made_in_a_few_blocks(monkeypatch):
    monkeypatch.setattr(loss_module, "_NEAR_LOGITS", 11 * 2)
    monkeypatch.setattr(loss_module, "_FEWEST_ROWS", 1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(41, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    targets = torch.randint(11, (41,))
    made = []

    def record(graph, _):
        made.extend(node.meta["val"].shape for node in graph.graph.nodes if node.target == torch.ops.aten.mm.default)
        return make_boxed_func(graph.forward)

    loss = torch.compile(linear_cross_entropy, backend=aot_autograd(fw_compiler=record))(hidden, weight, targets)
    assert [shape[0] for shape in made if shape[1] == 11] == [6] * 6 + [5]
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_target_below_0_that_is_not_left_out_is_refused():
    """Regression: it counted as token 0."""
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8)
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, torch.tensor([1, -1, 3, -100]))


def test_no_counted_target_is_no_loss_and_no_gradient():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("block", [2**25, 11 * 3])
def test_under_autocast_products_are_in_bfloat16_and_gradients_in_float32(block, monkeypatch):
    monkeypatch.setattr(loss_module, "BLOCK_LOGITS", block)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    targets = torch.randint(11, (10,))
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(rounded[0] @ rounded[1].T, targets)
    expected_grads = torch.autograd.grad(expected, rounded)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.01, rtol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)


def test_half_precision_takes_the_plain_form():
    hidden, weight = torch.randn(6, 4), torch.randn(5, 4)
    targets = torch.randint(5, (6,))
    half = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    torch.testing.assert_close(half, linear_cross_entropy(hidden, weight, targets), atol=0.05, rtol=0.02)


def test_the_gradient_of_many_blocks_in_bfloat16_is_as_near_as_that_of_one(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2048, 16), torch.randn(32, 16, requires_grad=True), torch.randint(32, (2048,))
    [expected] = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), weight)
    errors = []
    for block in (2**25, 32 * 8):
        monkeypatch.setattr(loss_module, "BLOCK_LOGITS", block)
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets)
        [grad] = torch.autograd.grad(loss, weight)
        errors.append(float((grad - expected).norm() / expected.norm()))
    assert errors[1] < 1.5 * errors[0]
