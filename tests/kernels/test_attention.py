"""The operator against the dense float64 reference: outputs, gradients, statistics, isolation."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sinkbed import kernels
from sinkbed.kernels import Mask, attention, attention_received, interval_mask, mean_received, top_sinks
from sinkbed.kernels import cpu as torch_cpu
from sinkbed.kernels.reference import probabilities
from sinkbed.kernels.scoring import Scoring
from tests.support.masks import MASKS, boundaries, inputs


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_output_gradients_and_statistics_equal_the_float64_reference(name, sink, groups):
    start, end = boundaries([5, 1, 1, 12, 4], rows=2)
    T = start.shape[1]
    mask = interval_mask(2, T, doc_start=start, doc_end=end, **MASKS[name](start, end))
    logit = torch.tensor([-50.0, 0.0, 1.3, 50.0], dtype=torch.float64) if sink else None

    def run(implementation, dtype):
        q, k, v = inputs(2, 4, 4 // groups, T, 8, dtype)
        s = None if logit is None else logit.to(dtype, copy=True).requires_grad_()
        out = attention(q, k, v, mask, sink_logit=s, statistics=True, implementation=implementation)
        received = attention_received(q, k, out.lse, mask, implementation=implementation)
        weight = torch.linspace(-1, 1, out.output.numel(), dtype=dtype).view_as(out.output)
        (out.output * weight).sum().backward()
        grads = [q.grad, k.grad, v.grad] + ([] if s is None else [s.grad])
        return [out.output, out.lse, *(x for x in out.statistics if x is not None), received], grads

    expected, expected_grads = run("reference", torch.float64)
    values, grads = run("torch", torch.float32)
    assert len(values) == len(expected) == (7 if sink else 5)
    for ours, oracle in zip(values, expected, strict=True):
        torch.testing.assert_close(ours.double(), oracle, atol=5e-6, rtol=5e-6)
    for ours, oracle in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), oracle, atol=2e-5, rtol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 25),
    document=st.booleans(),
    shared=st.integers(0, 3),
    prefix=st.integers(0, 8),
    hide=st.booleans(),
)
def test_any_interval_mask_equals_its_definition(lengths, window, document, shared, prefix, hide):
    T = sum(lengths)
    shared, prefix = min(shared, T), min(prefix, T)
    start, end = boundaries(lengths)
    mask = interval_mask(
        1, T, doc_start=start, doc_end=end, document=document, window=window,
        shared_prefix=shared, prefix_lm=prefix, hide_first_key=hide,
    )  # fmt: skip
    visible, starts = mask.visible()[0, 0], start[0].tolist()
    for i in range(T):
        for j in range(T):
            same = not document or starts[i] == starts[j]
            near = window is None or i - j < window
            seen = j <= i and same and near
            seen |= j > i and i < prefix and j < prefix and same
            seen |= j <= i and j < shared
            if hide and j == 0 and i > 0:
                seen = False
            assert visible[i, j].item() == seen, (i, j)


def test_masses_are_columns_of_the_attention_matrix():
    start, end = boundaries([6, 1, 9], rows=1)
    mask = interval_mask(1, 16, doc_start=start, doc_end=end, document=True, shared_prefix=1)
    q, k, v = inputs(1, 2, 1, 16, 8)
    a, _ = probabilities(q, k, mask, Scoring(scale=8**-0.5))
    found = attention(q, k, v, mask, statistics=True, implementation="torch").statistics
    assert (start[0] > 0).any(), "the layout must have a document that starts inside the row"
    for i in range(16):
        torch.testing.assert_close(found.first_key_mass[..., i], a[..., i, 0])
        torch.testing.assert_close(found.document_mass[..., i], a[..., i, start[0, i]])
    first_queries = start[0] == torch.arange(16)
    # With position 0 shared, a document's first query splits its mass between itself and position 0.
    total = found.first_key_mass + found.document_mass
    torch.testing.assert_close(total[..., first_queries][..., 1:], torch.ones(1, 2, 2, dtype=torch.float64))


def test_statistics_do_not_change_the_output():
    q, k, v = inputs(2, 4, 2, 33, 16, torch.float32)
    with_statistics = attention(q, k, v, statistics=True)
    without = attention(q, k, v)
    assert without.statistics is None
    assert torch.equal(with_statistics.output, without.output)
    assert torch.equal(with_statistics.lse, without.lse)


def test_a_large_value_in_one_document_reaches_no_other():
    start, end = boundaries([7, 9, 5])
    mask = interval_mask(1, 21, doc_start=start, doc_end=end, document=True)
    q, k, v = inputs(1, 2, 2, 21, 8, torch.float32)
    clean = attention(q, k, v, mask).output.detach()
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, 7:16] = 1e4
    poisoned = attention(q, k, v, mask).output.detach()
    assert torch.equal(clean[:, :, :7], poisoned[:, :, :7])
    assert torch.equal(clean[:, :, 16:], poisoned[:, :, 16:])
    assert not torch.equal(clean[:, :, 7:16], poisoned[:, :, 7:16])


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("options", [{"document": True}, {"document": True, "window": 3}], ids=["document", "window"])
def test_a_logit_that_overflows_reaches_no_other_document(options, sink):
    """PyTorch's kernel adds a mask to the logits, and infinity minus infinity is nan; with the dense way that then
    takes over, outputs, gradients and statistics of the other documents are those of ordinary numbers."""
    start, end = boundaries([6, 5, 4], rows=2)
    mask = interval_mask(2, 15, doc_start=start, doc_end=end, **options)
    logit = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sink else None

    def run(size: float):
        q, k, v = inputs(2, 4, 2, 15, 8, torch.float32)
        with torch.no_grad():
            k[:, :, 7] = size * k[:, :, 7].sign()
        s = None if logit is None else logit.clone().requires_grad_()
        out = attention(q, k, v, mask, sink_logit=s, statistics=True, implementation="torch")
        others = torch.cat([torch.arange(6), torch.arange(11, 15)])
        out.output[:, :, others].sum().backward()
        tensors = [out.output, q.grad, k.grad, v.grad, out.lse, *(x for x in out.statistics if x is not None)]
        return [x[:, :, others] for x in tensors]

    for overflowing, ordinary in zip(run(3e38), run(1.0), strict=True):
        torch.testing.assert_close(overflowing, ordinary, atol=5e-6, rtol=1e-5)


def test_packed_documents_equal_separate_ones():
    lengths = [7, 1, 13]
    start, end = boundaries(lengths)
    mask = interval_mask(1, 21, doc_start=start, doc_end=end, document=True)
    q, k, v = inputs(1, 4, 2, 21, 8, torch.float32)
    packed = attention(q, k, v, mask).output
    separate = [
        attention(*(x[:, :, a : a + n] for x in (q, k, v))).output for a, n in zip([0, 7, 8], lengths, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(separate, dim=2), atol=1e-6, rtol=1e-6)


def test_rows_of_many_key_blocks_with_whole_blocks_masked():
    start, end = boundaries([300, 1, 411, 588])
    mask = interval_mask(1, 1300, doc_start=start, doc_end=end, document=True, window=200, shared_prefix=2)
    q, k, v = (x.detach() for x in inputs(1, 2, 1, 1300, 8))
    ours = attention(*(x.float() for x in (q, k, v)), mask, statistics=True)
    oracle = attention(q, k, v, mask, statistics=True, implementation="reference")
    torch.testing.assert_close(ours.output.double(), oracle.output, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(ours.statistics.document_mass.double(), oracle.statistics.document_mass)


@pytest.mark.parametrize("sink", [False, True])
def test_long_rows_of_documents_are_computed_document_by_document(sink, monkeypatch):
    calls = []
    flash = torch_cpu._flash
    monkeypatch.setattr(torch_cpu, "_flash", lambda q, *a, **kw: calls.append(q.shape[2]) or flash(q, *a, **kw))
    layouts = [[300, 1, 200, 99], [600]]
    bounds = [boundaries(lengths) for lengths in layouts]
    start, end = (torch.cat(x) for x in zip(*bounds, strict=True))
    mask = interval_mask(2, 600, doc_start=start, doc_end=end, document=True)
    found = {}
    for implementation in ("torch", "reference"):
        torch.manual_seed(0)
        q, k, v = inputs(2, 4, 2, 600, 8)
        s = torch.randn(4, dtype=torch.float64, requires_grad=True) if sink else None
        out = attention(q, k, v, mask, sink_logit=s, statistics=True, implementation=implementation)
        (out.output.sin().sum() + out.lse.cos().sum()).backward()
        found[implementation] = [out.output, out.lse, *out.statistics[:2], *(x.grad for x in (q, k, v))]
        found[implementation] += [s.grad, out.statistics.learned_sink_mass] if sink else []
    for ours, oracle in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(ours, oracle)
    assert calls[:5] == [300, 1, 200, 99, 600] and not mask._bias


def test_a_mask_used_without_gradients_serves_a_backward_pass_later():
    start, end = boundaries([5, 7])
    mask = interval_mask(1, 12, doc_start=start, doc_end=end, document=True, window=4)
    q, k, v = inputs(1, 2, 2, 12, 16)
    with torch.inference_mode():
        attention(q, k, v, mask)
        assert mask.last_query is not None
    attention(q, k, v, mask).output.sum().backward()


def test_a_sink_at_minus_infinity_is_none():
    q, k, v = inputs(1, 2, 1, 9, 8)
    plain = attention(q, k, v, statistics=True)
    for implementation in ("torch", "reference"):
        none = torch.full((2,), float("-inf"), dtype=torch.float64)
        found = attention(q, k, v, sink_logit=none, statistics=True, implementation=implementation)
        torch.testing.assert_close(found.output, plain.output)
        torch.testing.assert_close(found.statistics.first_key_mass, plain.statistics.first_key_mass)
        assert not found.statistics.learned_sink_mass.any()


@pytest.mark.parametrize("sink", [False, True])
def test_a_gradient_of_gradients_is_refused_but_by_the_reference(sink):
    q, k, v = inputs(1, 2, 1, 9, 8)
    logit = torch.zeros(2, dtype=torch.float64, requires_grad=True) if sink else None
    first = lambda name: torch.autograd.grad(  # noqa: E731
        attention(q, k, v, sink_logit=logit, implementation=name).output.square().sum(), q, create_graph=True
    )[0]
    with pytest.raises(NotImplementedError, match="implementation='reference' has those"):
        first("torch").sum().backward()
    first("reference").sum().backward()
    assert q.grad.abs().max() > 0


def test_off_by_one_is_a_sink_logit_of_zero():
    q, k, v = inputs(1, 2, 2, 9, 8)
    out = attention(q, k, v, sink_logit=torch.zeros(2, dtype=torch.float64), statistics=True)
    mask = Mask(rows=1, length=9)
    logits = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask.visible(), float("-inf"))
    expected = logits.exp() / (1 + logits.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(out.output, expected @ v)
    torch.testing.assert_close(out.statistics.learned_sink_mass, 1 - expected.sum(-1))


def test_a_rerun_is_bitwise_equal():
    def run():
        q, k, v = inputs(2, 4, 2, 70, 16, torch.float32)
        out = attention(q, k, v, statistics=True)
        out.output.square().sum().backward()
        return [out.output, out.lse, *out.statistics[:2], q.grad, k.grad, v.grad]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("sink", ["none", "head", "query"])
@pytest.mark.parametrize("masked", ["no", "bias", "documents"])
@pytest.mark.parametrize("strided", [False, True])
def test_the_operator_passes_opcheck(sink, masked, strided):
    from sinkbed.kernels.cpu import _attention_torch, _attention_torch_backward

    q, k, v = inputs(1, 2, 1, 12, 8, torch.float32)
    if strided:  # as the model calls it: heads of one fused projection, [B, T, H, D] in memory
        qkv = torch.randn(1, 12, 4, 8, requires_grad=True).transpose(1, 2)
        q, k, v = qkv.split([2, 1, 1], dim=1)
    start, end = boundaries([5, 7])
    mask = interval_mask(1, 12, doc_start=start, doc_end=end, document=True)
    bias = mask.bias(torch.float32, q.device) if masked == "bias" else None
    by_document = mask.doc_start if masked == "documents" else None
    logit, value = {
        "none": (None, None),
        "head": (torch.zeros(2, requires_grad=True), None),
        "query": (torch.randn(1, 2, 12, requires_grad=True), torch.randn(2, 8, requires_grad=True)),
    }[sink]
    rest = (bias, by_document, logit, value, 0.3)
    torch.library.opcheck(_attention_torch, (q, k, v, *rest))
    with torch.no_grad():
        output, lse = _attention_torch(q, k, v, *rest)
        for grad in (torch.randn(1, 2, 12, 8), torch.randn(1, 12, 2, 8).transpose(1, 2)):
            torch.library.opcheck(
                _attention_torch_backward,
                (grad, q, k, v, output, lse, *rest),
                test_utils=["test_schema", "test_faketensor"],
            )


def test_strided_inputs_and_expanded_gradients_are_handled():
    qkv = torch.randn(2, 11, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    attention(q, k, v).output.sum().backward()
    strided = qkv.grad.clone()
    qkv.grad = None
    attention(*(x.transpose(1, 2).mT.contiguous().mT for x in qkv.unbind(2))).output.sum().backward()
    torch.testing.assert_close(qkv.grad, strided)  # of heads whose last stride is not 1
    qkv.grad = None
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv.unbind(2))
    attention(q, k, v, implementation="reference").output.sum().backward()
    torch.testing.assert_close(strided, qkv.grad)


@pytest.mark.parametrize("length", [1, 2, 63, 65])
def test_odd_lengths(length):
    q, k, v = inputs(1, 2, 2, length, 8)
    ours = attention(q, k, v, statistics=True)
    oracle = attention(q, k, v, statistics=True, implementation="reference")
    torch.testing.assert_close(ours.output, oracle.output)
    torch.testing.assert_close(ours.statistics.first_key_mass, oracle.statistics.first_key_mass)


BAD = {
    "lse: expected that of a softmax, got None": lambda q, k, v: attention_received(q, k, None),
    "i < end_key[i] <= T": lambda q, k, v: Mask(rows=1, length=3, end_key=positions(1, 1, 3)),
    "q: expected [B, H, T, D]": lambda q, k, v: attention(q[0], k, v),
    "k: expected [B=1": lambda q, k, v: attention(q, k[:, :, :3], v),
    "v: expected the dtype and device of q": lambda q, k, v: attention(q, k, v.double()),
    "q: expected no empty": lambda q, k, v: attention(*(x[:, :, :0] for x in (q, k, v))),
    "divides q's 3": lambda q, k, v: attention(q[:, :3], k, v),
    "sink_logit: expected a float dtype and shape [H=4]": lambda q, k, v: attention(q, k, v, sink_logit=torch.zeros(2)),
    "got torch.int64, [4]": lambda q, k, v: attention(q, k, v, sink_logit=torch.zeros(4, dtype=torch.int64)),
    "scale: expected a finite number above 0, got nan": lambda q, k, v: attention(q, k, v, scale=float("nan")),
    "scale: expected a finite number above 0, got 0": lambda q, k, v: attention(q, k, v, scale=0),
    "lse: expected a float dtype": lambda q, k, v: attention_received(q, k, torch.zeros(1, 4, 6, dtype=torch.int32)),
    "mask: expected its tensors on cpu as q, got meta": lambda q, k, v: attention(
        q, k, v, Mask(rows=1, length=6, first_key=torch.zeros(1, 6, dtype=torch.int32, device="meta"))
    ),
    "mask: expected B=1, T=6": lambda q, k, v: attention(q, k, v, Mask(rows=1, length=7)),
    "None for causal, got a Tensor": lambda q, k, v: attention(q, k, v, torch.ones(6, 6).bool()),
    "normalizer: expected a module of": lambda q, k, v: attention(q, k, v, normalizer="sigmoid"),
    "slopes: expected a tensor of shape [H=4], got a list": lambda q, k, v: attention(q, k, v, slopes=[1.0] * 4),
    "implementation: expected one of": lambda q, k, v: attention(q, k, v, implementation="flash"),
    "first_key: expected int32": lambda q, k, v: Mask(rows=1, length=6, first_key=torch.zeros(1, 6)),
    "never decreasing along a row; got 0 at i = 2 of row 0": lambda q, k, v: Mask(
        rows=1, length=3, first_key=torch.tensor([[0, 1, 0]], dtype=torch.int32)
    ),
    "window: expected at least 1": lambda q, k, v: interval_mask(1, 6, window=0),
    "document: expected doc_start": lambda q, k, v: interval_mask(1, 6, document=True),
    "s[s[i]] == s[i]; got 1 at i = 2": lambda q, k, v: interval_mask(1, 5, doc_start=positions(0, 0, 1, 1, 2)),
    "doc_start: expected int32 of shape [1, 6]": lambda q, k, v: interval_mask(
        1, 6, doc_start=positions(1, 5), document=True, window=2
    ),
    "doc_end: expected int32 of shape [1, 3]": lambda q, k, v: interval_mask(
        1, 3, doc_start=positions(0, 0, 2), doc_end=positions(2, 2, 3).long()
    ),
    "doc_end: expected 1 to T": lambda q, k, v: interval_mask(
        1, 3, doc_start=positions(0, 0, 2), doc_end=positions(3, 3, 3), document=True, prefix_lm=3
    ),
    "on one device, cpu, got meta": lambda q, k, v: Mask(
        rows=1, length=3, first_key=positions(0, 0, 0), doc_start=positions(0, 0, 0).to("meta")
    ),
    "shared_prefix: expected 0 to 6 (T), got -5": lambda q, k, v: interval_mask(1, 6, shared_prefix=-5),
    "shared_prefix: expected 0 to 6 (T), got 99": lambda q, k, v: interval_mask(1, 6, shared_prefix=99),
    "prefix_lm: expected 0 to 6 (T), got 7": lambda q, k, v: interval_mask(1, 6, prefix_lm=7),
}


def positions(*values):
    return torch.tensor([values], dtype=torch.int32)


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_argument_is_refused_with_expected_and_received(message):
    q, k, v = (x.detach() for x in inputs(1, 4, 2, 6, 8, torch.float32))
    with pytest.raises(ValueError) as refused:
        BAD[message](q, k, v)
    assert message in str(refused.value)
    assert "got" in str(refused.value)


def test_no_device_falls_back_to_the_reference(monkeypatch):
    x = torch.zeros(1, 1, 4, 8, device="meta")
    with pytest.raises(ValueError, match=r"expected q on a CPU or CUDA, got meta; implementation='reference'"):
        attention(x, x, x)
    assert attention(x, x, x, implementation="reference").output.device.type == "meta"
    monkeypatch.delitem(kernels.api._IMPLEMENTATIONS, "triton", raising=False)
    with pytest.raises(ValueError, match="expected the package triton, got none"):
        kernels.api._choose(None, torch.device("cuda"))


def test_a_mask_on_a_gpu_is_checked_without_waiting_for_it(monkeypatch):
    """On fake CUDA tensors, whose values nothing can wait for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda right, message: asserted.append((right.shape, message)))
    with FakeTensorMode():
        start = torch.zeros(2, 6, dtype=torch.int32, device="cuda")
        mask = interval_mask(2, 6, doc_start=start, doc_end=start + 6, document=True, window=3, prefix_lm=3)
        assert mask.first_key.device.type == "cuda"
    assert all(shape == () for shape, _ in asserted)
    for name in ("first_key", "end_key", "doc_start", "doc_end"):
        assert any(message.startswith(f"{name}: expected") for _, message in asserted)


@pytest.mark.parametrize("name", MASKS)
def test_the_transposed_tensors_are_there_before_they_are_used(name):
    """What a compiled function finds on its second call is what it found on its first."""
    start, end = boundaries([5, 1, 1, 12, 4])
    mask = interval_mask(1, 23, doc_start=start, doc_end=end, **MASKS[name](start, end))
    before = list(mask._ends)
    found = mask.first_query, mask.last_query
    assert list(mask._ends) == before
    assert [x is None for x in found] == [mask.end_key is None, mask.first_key is None]
    assert torch.equal(mask.doc_end, end)


def test_what_a_mask_computes_is_not_taken_along_by_another():
    """A Jacobian repeats the mask of a row: with the old tensors a kernel read beyond their end."""
    one = interval_mask(1, 9, hide_first_key=True)
    assert one.bias(torch.float32, torch.device("cpu")).shape[0] == one.last_query.shape[0] == 1
    three = dataclasses.replace(one, rows=3, first_key=one.first_key.expand(3, -1).contiguous())
    assert three.bias(torch.float32, torch.device("cpu")).shape[0] == three.last_query.shape[0] == 3


def test_the_private_flash_operator_still_behaves_as_relied_on():
    q, k, v = (x.detach() for x in inputs(1, 4, 2, 20, 8, torch.float32))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=0.25)
    mask = Mask(rows=1, length=20)
    a, expected_lse = probabilities(q.double(), k.double(), mask, Scoring(scale=0.25))
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-6)
    expected = a @ v.double().repeat_interleave(2, 1)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
    assert kernels.available("cpu")[0] == "torch"


@pytest.mark.parametrize("name", MASKS)
def test_statistics_mean_what_they_say(name):
    """From the definition, not from the reference's code: the matrix row by row."""
    start, end = boundaries([5, 1, 1, 12, 4])
    T = start.shape[1]
    mask = interval_mask(1, T, doc_start=start, doc_end=end, **MASKS[name](start, end))
    q, k, v = (x.detach() for x in inputs(1, 2, 1, T, 8))
    sink = torch.tensor([0.7, -30.0], dtype=torch.float64)
    out = attention(q, k, v, mask, sink_logit=sink, statistics=True, implementation="reference")
    received = attention_received(q, k, out.lse, mask, implementation="reference")
    visible = mask.visible()[0, 0]
    columns = torch.zeros(2, T, dtype=torch.float64)
    for h in range(2):
        for i in range(T):
            seen = visible[i].nonzero()[:, 0]
            logits = torch.cat([q[0, h, i] @ k[0, 0, seen].T * 8**-0.5, sink[h : h + 1]])
            p = logits.softmax(0)
            columns[h, seen] += p[:-1]
            for mass, key in ((out.statistics.first_key_mass, 0), (out.statistics.document_mass, int(start[0, i]))):
                assert mass[0, h, i] == pytest.approx(float(p[:-1][seen == key].sum()), abs=1e-12)
            assert out.statistics.learned_sink_mass[0, h, i] == pytest.approx(float(p[-1]), abs=1e-12)
    torch.testing.assert_close(received[0], columns)
    torch.testing.assert_close(received.sum(-1), T - out.statistics.learned_sink_mass.sum(-1))
    assert torch.equal(mask.queries_per_key()[0], visible.sum(0))
    torch.testing.assert_close(mean_received(received, mask)[0], columns / visible.sum(0))


def test_top_sinks_finds_the_keys_that_draw_attention():
    start, end = boundaries([40, 60])
    mask = interval_mask(1, 100, doc_start=start, doc_end=end, document=True)
    q, k, v = (x.detach() * 0.1 for x in inputs(1, 2, 2, 100, 8, torch.float32))
    direction = torch.ones(8)
    q += direction
    k[0, 0, 40] += 2 * direction  # head 0 attends to the start of the second document, then to key 10
    k[0, 0, 10] += 1 * direction
    k[0, :, 99] += 9 * direction  # the last key is seen by one query only
    out = attention(q, k, v, mask)
    received = attention_received(q, k, out.lse, mask)
    found = top_sinks(received, mask, count=2)
    assert found.positions[0, 0].tolist() == [40, 10]
    assert found.attention[0, 0, 0] > 0.5 > found.attention[0, 0, 1] > 0.1
    assert top_sinks(received, mask, count=1, min_queries=1).positions[0, :, 0].tolist() == [99, 99]
    nothing = top_sinks(received, mask, count=3, min_queries=60)
    assert nothing.positions[0, 0].tolist() == [40, -1, -1] and nothing.attention[0, 0, 1] == 0
    with pytest.raises(ValueError, match="count: expected 1 to 100"):
        top_sinks(received, mask, count=101)


def test_wrong_requests_are_refused():
    q, k, _ = inputs(1, 2, 1, 6, 8)
    with pytest.raises(ValueError, match=r"lse: expected a float dtype and shape \[1, 2, 6\]"):
        attention_received(q, k, torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="mask: expected B=1, T=6"):
        attention_received(q, k, torch.zeros(1, 2, 6), Mask(rows=2, length=6))


def test_column_sums_never_hold_the_matrix(monkeypatch):
    shapes = []
    logits = Scoring.logits
    monkeypatch.setattr(Scoring, "logits", lambda *a: shapes.append(logits(*a).shape[2]) or logits(*a))
    q, k, v = (x.detach() for x in inputs(1, 1, 1, 300, 8, torch.float32))
    attention_received(q, k, attention(q, k, v).lse, implementation="torch")
    assert shapes == [128, 128, 44]
