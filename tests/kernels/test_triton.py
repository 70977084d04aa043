"""The Triton kernels in Triton's interpreter, on CPU tensors, against the dense float64 reference.

Registers, shared memory, races and bfloat16 do not show there; tiles are small so that few positions cross many
tile borders.
"""

from contextlib import nullcontext

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sinkbed.kernels import Mask, attention, attention_received, available, interval_mask
from tests.support.masks import MASKS, boundaries, inputs

pytestmark = pytest.mark.skipif(
    "triton" not in available("cpu"), reason="the kernels run on a CPU in Triton's interpreter only"
)


@pytest.fixture(autouse=True)
def unwritten_outputs_are_nan():
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


SOFTMAX = (0.25, None, "softmax", False, None, 0.0)
"""The scoring of the operators: a scale, no softcap, no normaliser."""


def small_tiles(m=16, n=16):
    from sinkbed.kernels.triton.tiles import Tiles, override

    override.update(dict.fromkeys(("forward", "dq", "dkv", "received"), Tiles(m, n, 4, 1)))


@pytest.fixture(autouse=True)
def no_override():
    yield
    from sinkbed.kernels.triton.tiles import override

    override.clear()


def run(implementation, dtype, mask, B, H, Hkv, T, D, sink=None, seed=0):
    """Outputs and statistics, then gradients, of a loss in which output and lse both count."""
    q, k, v = inputs(B, H, Hkv, T, D, dtype, seed)
    logit = None if sink is None else torch.tensor(sink, dtype=dtype).requires_grad_()
    out = attention(q, k, v, mask, sink_logit=logit, statistics=True, implementation=implementation)
    received = attention_received(q, k, out.lse, mask, implementation=implementation)
    weight = torch.linspace(-1, 1, out.output.numel(), dtype=torch.float64).view_as(out.output)
    of_lse = torch.linspace(1, -1, out.lse.numel(), dtype=torch.float64).view_as(out.lse)
    ((out.output.double() * weight).sum() + (out.lse.double() * of_lse).sum()).backward()
    values = [out.output, out.lse, *(x for x in out.statistics if x is not None), received]
    return [x.detach() for x in values] + [q.grad, k.grad, v.grad] + ([] if logit is None else [logit.grad])


def worst(found, expected):
    """Largest deviation of any; NaN where any is NaN, which Python's max would pass over."""
    deviations = [(a.double() - b.double()).abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(deviations).detach().max())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_unwritten_element_counts_in_whichever_tensor_it_is(place):
    """Python's max over floats passes over NaN unless it comes first: an unwritten gradient went unseen."""
    tensors = [torch.zeros(3) for _ in range(3)]
    tensors[place][1] = float("nan")
    assert not worst(tensors, [torch.zeros(3)] * 3) < 5e-6


COMBINED = ("document, first position shared", "document, window 4", "document, prefix LM", "first key hidden")
"""Masks that are tried by default: between them they have every term; the others are slow tests."""
CASES = [
    pytest.param(name, i % 2 == 0, (1, 2, 4)[i % 3], marks=() if name in COMBINED else pytest.mark.slow)
    for i, name in enumerate(MASKS)
]


@pytest.mark.parametrize(("name", "sink", "groups"), CASES)
def test_values_statistics_and_gradients_equal_the_float64_reference(name, sink, groups):
    start, end = boundaries([5, 1, 1, 12, 18], rows=2)
    T = start.shape[1]
    mask = interval_mask(2, T, doc_start=start, doc_end=end, **MASKS[name](start, end))
    shape = (2, 4, 4 // groups, T, 16)
    logit = [-50.0, 0.0, 1.3, 50.0] if sink else None
    small_tiles()
    found = run("triton", torch.float32, mask, *shape, sink=logit)
    expected = run("reference", torch.float64, mask, *shape, sink=logit)
    assert len(found) == (11 if sink else 8)
    assert worst(found, expected) < 5e-6


@pytest.mark.parametrize("T", [1, 15, 16, 17, 33])
def test_any_length_and_unequal_tiles(T):
    start, end = boundaries([max(1, T // 2), T - max(1, T // 2)] if T > 1 else [1])
    mask = interval_mask(1, T, doc_start=start, doc_end=end, document=True, shared_prefix=1)
    for m, n in ((16, 16), (32, 16), (16, 32)):
        small_tiles(m, n)
        found = run("triton", torch.float32, mask, 1, 2, 1, T, 16)
        assert worst(found, run("reference", torch.float64, mask, 1, 2, 1, T, 16)) < 5e-6


@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
def test_head_dims(D):
    found = run("triton", torch.float32, None, 1, 2, 1, 40, D)
    assert worst(found, run("reference", torch.float64, None, 1, 2, 1, 40, D)) < 5e-6


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 40),
    document=st.booleans(),
    shared=st.integers(0, 20),
    prefix=st.integers(0, 20),
    hide=st.booleans(),
    groups=st.sampled_from([1, 2]),
    tile=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
)
@pytest.mark.slow
def test_any_mask_layout_and_tile(lengths, window, document, shared, prefix, hide, groups, tile):
    T = sum(lengths)
    start, end = boundaries(lengths)
    mask = interval_mask(
        1, T, doc_start=start, doc_end=end, document=document, window=window,
        shared_prefix=min(shared, T), prefix_lm=min(prefix, T), hide_first_key=hide,
    )  # fmt: skip
    small_tiles(*tile)
    found = run("triton", torch.float32, mask, 1, 2, 2 // groups, T, 16, sink=[0.5, -1.0])
    assert worst(found, run("reference", torch.float64, mask, 1, 2, 2 // groups, T, 16, sink=[0.5, -1.0])) < 5e-6


def test_float16_errs_no_more_than_an_ordinary_low_precision_run():
    start, end = boundaries([9, 24])
    mask = interval_mask(1, 33, doc_start=start, doc_end=end, document=True)
    expected = run("reference", torch.float64, mask, 1, 2, 1, 33, 16)
    ordinary = run("reference", torch.float16, mask, 1, 2, 1, 33, 16)
    assert worst(run("triton", torch.float16, mask, 1, 2, 1, 33, 16), expected) <= 2 * worst(ordinary, expected)


@pytest.fixture
def rounded_bfloat16(monkeypatch):
    """Triton's interpreter multiplies the raw bits of bfloat16 and truncates where hardware rounds: mend both."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widen(a), widen(b), *rest)

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = source.data.view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(nearest_even.astype(np.uint16), tl.bfloat16)

    for name, function in (("create_dot", create_dot), ("cast_impl", cast_impl)):
        monkeypatch.setattr(builder, name, function)


@pytest.mark.parametrize("D", [16, 64])
def test_bfloat16_errs_no_more_than_an_ordinary_low_precision_run(rounded_bfloat16, D):
    start, end = boundaries([9, 24])
    mask = interval_mask(1, 33, doc_start=start, doc_end=end, document=True)
    exact = [x.detach().bfloat16() for x in inputs(1, 2, 1, 33, D)]

    def values(implementation, dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in exact)
        out = attention(q, k, v, mask, statistics=True, implementation=implementation)
        weight = torch.linspace(-1, 1, out.output.numel()).view_as(out.output).bfloat16()
        grads = torch.autograd.grad(out.output, (q, k, v), weight.to(dtype))
        return [out.output, *grads, out.lse, *(x for x in out.statistics if x is not None)]

    expected = values("reference", torch.float64)
    found, ordinary = values("triton", torch.bfloat16), values("reference", torch.bfloat16)
    assert found[0].dtype == torch.bfloat16 and found[4].dtype == torch.float32
    for ours, theirs, true in zip(found, ordinary, expected, strict=True):
        scale = true.abs().max().item()
        assert worst([ours], [true]) <= max(1.5 * worst([theirs], [true]), 2e-3 * scale)
    # lse and statistics are float32 throughout: nothing but the inputs is rounded.
    assert all(worst([a], [b]) < 1e-5 for a, b in zip(found[4:], expected[4:], strict=True))


def test_a_rerun_is_bitwise_equal_and_strides_do_not_matter():
    first, second = (run("triton", torch.float32, None, 1, 4, 2, 33, 16) for _ in range(2))
    assert len(first) == 8, "output, lse, statistics, attention got and gradients"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    q, k, v = (x.detach() for x in inputs(1, 4, 2, 33, 16, torch.float32))
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not apart[0].is_contiguous()
    assert torch.equal(attention(*apart, implementation="triton").output, first[0])
    backwards = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert backwards[0].stride(-1) != 1
    assert torch.equal(attention(*backwards, implementation="triton").output, first[0])


def test_a_large_value_in_one_document_reaches_no_other():
    start, end = boundaries([7, 9, 5])
    mask = interval_mask(1, 21, doc_start=start, doc_end=end, document=True)
    small_tiles()
    clean = run("triton", torch.float32, mask, 1, 2, 2, 21, 16)

    q, k, v = inputs(1, 2, 2, 21, 16, torch.float32)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, 7:16] = 1e4
    out = attention(q, k, v, mask, implementation="triton")
    assert torch.equal(clean[0][:, :, :7], out.output[:, :, :7])
    assert torch.equal(clean[0][:, :, 16:], out.output[:, :, 16:])
    assert not torch.equal(clean[0][:, :, 7:16], out.output[:, :, 7:16])


def test_statistics_do_not_change_the_output():
    q, k, v = inputs(1, 2, 1, 33, 16, torch.float32)
    without = attention(q, k, v, implementation="triton")
    found = attention(q, k, v, statistics=True, implementation="triton")
    assert torch.equal(found.output, without.output)
    assert torch.equal(found.lse, without.lse)


def test_the_mass_is_exact_at_large_logits():
    q, k, v = inputs(1, 1, 1, 24, 16, torch.float64)
    q = q.detach() * 1000
    found = attention(*(x.float() for x in (q, k, v)), statistics=True, implementation="triton")
    expected = attention(*(x.float().double() for x in (q, k, v)), statistics=True, implementation="reference")
    error = (found.statistics.first_key_mass.double() - expected.statistics.first_key_mass).abs().max()
    assert found.lse.abs().max() > 1000
    assert error < 5e-4, "exp(logit − lse) of a float32 lse would drift further"


def strided(x, step=2):
    """The same values, every `step`-th element of a larger tensor along the last dimension."""
    return torch.stack([x, *(torch.full_like(x, 77) for _ in range(step - 1))], -1).flatten(-2)[..., ::step]


def test_masks_and_sinks_of_any_strides_are_read_as_they_are():
    """The kernels read them as contiguous: strided ones gave other values, expanded ones ran out of bounds."""
    start, end = boundaries([5, 7, 9], rows=2)
    bounds = interval_mask(2, 21, doc_start=start, doc_end=end, document=True, prefix_lm=9, shared_prefix=1)
    names = ("first_key", "end_key", "doc_start")
    expanded = {n: getattr(bounds, n)[:1].expand(2, -1) for n in names}
    apart = {n: strided(getattr(bounds, n)) for n in names}
    sink = torch.tensor([2.0]).expand(4)
    q, k, v = (x.detach() for x in inputs(2, 4, 2, 21, 16, torch.float32))

    def values(mask, sink):
        out = attention(q, k, v, mask, sink_logit=sink, statistics=True, implementation="triton")
        measured = [x for x in out.statistics if x is not None]
        return [out.output, *measured, attention_received(q, k, out.lse, mask, implementation="triton")]

    expected = values(bounds, sink.contiguous())
    for tensors, logit in ((expanded, sink), (apart, strided(torch.full((4,), 2.0)))):
        assert not any(x.is_contiguous() for x in (*tensors.values(), logit))
        mask = Mask(rows=2, length=21, shared_prefix=1, **tensors)
        assert all(torch.equal(a, b) for a, b in zip(values(mask, logit), expected, strict=True))


def test_the_operators_themselves_take_any_strides():
    ops = torch.ops.sinkbed
    start, end = boundaries([5, 7, 9])
    mask = interval_mask(1, 21, doc_start=start, doc_end=end, document=True, prefix_lm=9)
    bounds = (mask.first_key, mask.end_key, mask.first_query, mask.last_query)
    q, k, v = (x.detach() for x in inputs(1, 2, 1, 21, 16, torch.float32))
    grad, sink = torch.randn_like(q), torch.tensor([0.5, -1.0])
    results = []
    for f in (lambda x: x, strided):
        forward = (*map(f, (q, k, v)), *map(f, (*bounds, start, mask.doc_end, sink)), None, 0, 0, *SOFTMAX, True)
        found = ops.attention_triton(*forward)
        lse = found[1]
        back = ops.attention_triton_backward(
            f(grad), f(lse), *map(f, (q, k, v, found[0], lse, *bounds, sink)), None, 0, 0, *SOFTMAX
        )
        received = ops.attention_received_triton(*map(f, (q, k, lse, *bounds[2:])), 0, 0, 0.25)
        results.append([*found, *back, received])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_whose_elements_overlap_have_outputs_of_their_own():
    """Windows of one line: memory laid out as theirs would have had strides that the kernels do not write to."""
    line = torch.randn(1, 2, 9 + 63, dtype=torch.float64)
    exact = line.unfold(2, 64, 1)
    q = line.float().unfold(2, 64, 1).requires_grad_()
    assert q.shape == (1, 2, 9, 64) and q.stride()[2:] == (1, 1) and torch.empty_like(q).stride(-1) != 1
    found = attention(q, q, q, implementation="triton").output.detach()
    expected = attention(exact, exact, exact, implementation="reference").output
    assert worst([found], [expected]) < 5e-6
    torch.library.opcheck(torch.ops.sinkbed.attention_triton.default, (q, q, q, *[None] * 8, 0, 0, *SOFTMAX, True))


def test_a_stride_whose_offsets_leave_32_bits_is_copied():
    from sinkbed.kernels.triton.op import _readable

    near, far = (torch.empty_strided((1, 1, 200, 16), (1, 1, s, 1), device="meta") for s in (2**24 - 1, 2**24))
    assert _readable(near)[0] is near and _readable(far)[0].stride(2) == 16


def test_the_walk_over_documents_ends_whatever_the_documents_are():
    """Ends that do not lie behind their positions held it for ever."""
    import signal

    def late(*_):
        raise TimeoutError("the kernel is still walking")

    q, k, v = (x.detach() for x in inputs(1, 1, 1, 21, 16, torch.float32))
    start, end = torch.arange(21, dtype=torch.int32)[None], torch.zeros(1, 21, dtype=torch.int32)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        torch.ops.sinkbed.attention_triton(q, k, v, *[None] * 4, start, end, None, None, 0, 0, *SOFTMAX, True)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_launch_goes_to_the_tensors_device(monkeypatch):
    from types import SimpleNamespace

    from sinkbed.kernels.triton import op

    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    call = op._on_its_device(lambda q, n: n)
    assert call(SimpleNamespace(device=torch.device("cuda", 1)), 3) == 3 and call(torch.zeros(1), 4) == 4
    assert entered == [torch.device("cuda", 1)]
    for launch in (op._forward, op._backward_kernels, op._received):
        assert hasattr(launch, "__wrapped__")


def test_a_gradient_of_gradients_is_refused():
    """It was silently zero."""
    q, k, v = inputs(1, 2, 1, 9, 16, torch.float32)
    out = attention(q, k, v, implementation="triton")
    [dq] = torch.autograd.grad(out.output.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one backward pass"):
        dq.sum().backward()


def test_a_sink_at_minus_infinity_is_none():
    logit = [float("-inf"), 0.5]
    found = run("triton", torch.float32, None, 1, 2, 1, 21, 16, sink=logit)
    assert worst(found, run("reference", torch.float64, None, 1, 2, 1, 21, 16, sink=logit)) < 5e-6


def test_the_mass_on_the_sink_is_exact_at_large_logits():
    q, k, v = (x.detach() for x in inputs(1, 1, 1, 24, 16, torch.float64))
    q = (q * 1000).float().double()
    k, v = k.float().double(), v.float().double()
    largest = attention(q, k, v, implementation="reference").lse.mean()
    sink = largest.float()[None]
    found = attention(q.float(), k.float(), v.float(), sink_logit=sink, statistics=True, implementation="triton")
    expected = attention(q, k, v, sink_logit=sink.double(), statistics=True, implementation="reference")
    drifting = (sink - found.lse).exp()
    true = expected.statistics.learned_sink_mass
    errors = [float((x.double() - true).abs().max()) for x in (found.statistics.learned_sink_mass, drifting)]
    assert found.lse.abs().max() > 1000 and true.max() > 0.01
    assert errors[0] < errors[1]


def test_a_column_sum_has_the_dtype_of_its_lse():
    q, k, v = (x.detach() for x in inputs(1, 2, 1, 21, 16, torch.float32))
    lse = attention(q, k, v).lse
    for implementation in ("triton", "torch", "reference"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert attention_received(q, k, lse.to(dtype), implementation=implementation).dtype == dtype


def test_the_operators_pass_opcheck():
    start, end = boundaries([9, 12])
    mask = interval_mask(1, 21, doc_start=start, doc_end=end, document=True)
    q, k, v = inputs(1, 2, 1, 21, 16, torch.float32)
    sink = torch.zeros(2, requires_grad=True)
    boundaries_and_sink = (mask.first_key, None, None, mask.last_query, start, mask.doc_end, sink)
    arguments = (q, k, v, *boundaries_and_sink, None, 0, 0, *SOFTMAX, True)
    torch.library.opcheck(torch.ops.sinkbed.attention_triton.default, arguments)
    q, k, lse = q.detach(), k.detach(), torch.zeros(1, 2, 21)
    received = torch.ops.sinkbed.attention_received_triton.default
    torch.library.opcheck(received, (q, k, lse, None, mask.last_query, 0, 0, 0.25))


def test_lse_alone_may_be_a_loss():
    gradients = []
    for implementation in ("triton", "reference"):
        q, k, v = inputs(1, 2, 1, 21, 16, torch.float32)
        attention(q, k, v, implementation=implementation).lse.square().sum().backward()
        assert v.grad is None or not v.grad.any()
        gradients.append((q.grad, k.grad))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_torch_compile_sees_one_operator_and_breaks_no_graph():
    start, end = boundaries([9, 12])
    mask = interval_mask(1, 21, doc_start=start, doc_end=end, document=True)

    def function(q, k, v):
        out = attention(q * 2, k, v, mask, statistics=True, implementation="triton")
        received = attention_received(q * 2, k, out.lse, mask, implementation="triton")
        return (out.output * 3).sum() + out.lse.sum(), (out.statistics.first_key_mass, received)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        q, k, v = inputs(1, 2, 1, 21, 16, torch.float32)
        loss, found = call(q, k, v)
        loss.backward()
        results.append([loss.detach(), *found, q.grad, k.grad, v.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_mask_used_again_does_not_compile_anew():
    """Its cached tensors, made on first use, were a change that a compiled function guards against."""
    start, end = boundaries([9, 12])
    mask = interval_mask(1, 21, doc_start=start, doc_end=end, document=True, prefix_lm=3)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def function(q):
        return attention(q, q, q, mask, statistics=True, implementation="triton").output

    q = torch.randn(1, 2, 21, 16)
    for _ in range(3):
        function(q)
    assert len(graphs) == 1


def test_a_decoder_on_the_kernels_equals_one_on_the_reference():
    from sinkbed.model import Decoder, DecoderConfig

    config = DecoderConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, sink="learned")
    tokens = torch.randint(50, (2, 34), generator=torch.Generator().manual_seed(0))
    start, end = boundaries([12, 21], rows=2)
    mask = interval_mask(2, 33, doc_start=start, doc_end=end, document=True, shared_prefix=1)
    results = []
    for implementation in ("triton", "reference"):
        torch.manual_seed(0)
        decoder = Decoder(config, 50)
        decoder.implementation = implementation
        out = decoder(tokens[:, :-1], None, mask, targets=tokens[:, 1:], statistics=True)
        out.loss.backward()
        results.append(
            [out.loss.detach(), *(s.first_key_mass for s in out.statistics), *(p.grad for p in decoder.parameters())]
        )
    assert worst(*results) < 1e-5


def test_what_the_kernels_cannot_do_is_refused():
    q, k, v = inputs(1, 2, 2, 8, 24, torch.float32)
    with pytest.raises(ValueError, match="head dim of 16, 32, 64, 96, 128, 256, got 24"):
        attention(q, k, v, implementation="triton")
    q, k, v = inputs(1, 2, 2, 8, 16, torch.float64)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        attention(q, k, v, implementation="triton")
