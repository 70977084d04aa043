"""The compiled kernels on a GPU against the float64 reference: `pytest -m gpu`. What the interpreter cannot show:
matrix units, bfloat16 and TF32 as they are, races, launches on a stream."""

import pytest
import torch

from sinkbed.kernels import Mask, attention, attention_received, interval_mask
from sinkbed.kernels.triton.tiles import HEAD_DIMS
from tests.support.masks import MASKS, boundaries
from tests.support.scorings import SCORINGS, scoring

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
DEVICE = "cuda"
LENGTHS = [130, 1, 63, 250, 300, 17]  # T 761: no multiple of a tile


def values(implementation, dtype, mask, inputs, sink=None, **arguments):
    """Output, statistics, gradients; with the plain softmax lse and attention received."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    logit = None if sink is None else sink.to(dtype, copy=True).requires_grad_()
    out = attention(q, k, v, mask, sink_logit=logit, statistics=True, implementation=implementation, **arguments)
    of_softmax = []
    if not arguments:
        of_softmax = [out.lse, attention_received(q, k, out.lse.detach(), mask, implementation=implementation)]
    weight = torch.linspace(-1, 1, out.output.numel(), device=q.device).view_as(out.output)
    weight = weight.to(inputs[0].dtype).to(dtype)
    differentiated = [x for x in (q, k, v, logit) if x is not None]
    loss = (out.output * weight).sum() + sum(x.sum() for x in of_softmax[:1])
    grads = torch.autograd.grad(loss, differentiated)
    found = [out.output, *(x for x in out.statistics or () if x is not None), *of_softmax, *grads]
    return [x.detach() for x in found]


def drawn(B, H, Hkv, T, D, dtype, device=DEVICE):
    torch.manual_seed(0)
    return [torch.randn(B, heads, T, D, device=device).to(dtype) for heads in (H, Hkv, Hkv)]


def relative(found, expected):
    return [
        float(((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6)).detach())
        for a, b in zip(found, expected, strict=True)
    ]


def assert_near(dtype, mask, inputs, *sink, floor, **arguments):
    """The kernels err no more than twice an ordinary run in the same dtype, against the reference in float64."""
    found, ordinary, expected = (
        values(implementation, of, mask, inputs, *sink, **arguments)
        for implementation, of in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
    )
    for ours, theirs in zip(relative(found, expected), relative(ordinary, expected), strict=True):
        assert ours <= max(2 * theirs, floor)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_values_statistics_and_gradients_equal_the_float64_reference(name, dtype, D):
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS, rows=2))
    mask = interval_mask(2, sum(LENGTHS), doc_start=start, doc_end=end, **MASKS[name](start, end))
    inputs = drawn(2, 4, 2, sum(LENGTHS), D, dtype)
    sink = torch.tensor([-50.0, 0.0, 1.25, 8.0], device=DEVICE)
    assert_near(dtype, mask, inputs, sink, floor=5e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 128])
def test_scorings_equal_the_float64_reference(name, dtype, D):
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS, rows=2))
    mask = interval_mask(2, sum(LENGTHS), doc_start=start, doc_end=end, document=True, shared_prefix=1)
    inputs, arguments = drawn(2, 2, 1, sum(LENGTHS), D, dtype), scoring(**SCORINGS[name], device=DEVICE)
    assert_near(dtype, mask, inputs, floor=1e-4 if dtype == torch.float32 else 2e-3, **arguments)


def test_a_rerun_is_bitwise_equal_and_unwritten_memory_is_not_read():
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS))
    mask = interval_mask(1, sum(LENGTHS), doc_start=start, doc_end=end, document=True, shared_prefix=1)
    inputs = drawn(1, 8, 2, sum(LENGTHS), 64, torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        runs = [values("triton", torch.bfloat16, mask, inputs) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in runs[0])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_statistics_do_not_change_the_output():
    inputs = drawn(1, 4, 4, 700, 64, torch.bfloat16)
    plain, measured = (attention(*inputs, statistics=statistics) for statistics in (False, True))
    assert torch.equal(plain.output, measured.output) and torch.equal(plain.lse, measured.lse)


def test_large_values_of_one_document_reach_no_other():
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS))
    mask = interval_mask(1, sum(LENGTHS), doc_start=start, doc_end=end, document=True)
    q, k, v = drawn(1, 2, 2, sum(LENGTHS), 64, torch.bfloat16)
    clean = attention(q, k, v, mask).output
    for x in (q, k, v):
        x[:, :, 131:194] = 1e4
    dirty = attention(q, k, v, mask).output
    assert torch.equal(clean[:, :, :131], dirty[:, :, :131]) and torch.equal(clean[:, :, 194:], dirty[:, :, 194:])


def close(found, expected, dtype=torch.bfloat16):
    """As close to the float64 reference as low precision comes; NaN is not."""
    assert all(x <= (5e-5 if dtype == torch.float32 else 3e-2) for x in relative(found, expected))


@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (3, 3)])
@pytest.mark.parametrize("T", [1, 2, 127, 129])
def test_single_heads_and_positions(H, Hkv, T):
    start, end = (x.to(DEVICE) for x in boundaries([1, T - 1] if T > 1 else [1]))
    mask = interval_mask(1, T, doc_start=start, doc_end=end, document=True, shared_prefix=1)
    inputs, sink = drawn(1, H, Hkv, T, 64, torch.float32), torch.linspace(-1, 2, H, device=DEVICE)
    expected = values("reference", torch.float64, mask, inputs, sink)
    # A query that sees one key has gradients of zero: compared by what they are, not relative to it.
    for ours, true in zip(values("triton", torch.float32, mask, inputs, sink), expected, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-4, rtol=1e-4)


def test_strided_inputs_and_expanded_gradients():
    B, T, H, Hkv, D = 2, 300, 4, 2, 64
    torch.manual_seed(0)
    qkv = torch.randn(B, T, H + 2 * Hkv, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    across = torch.randn(B, H, D, T, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    _, k, v = qkv.transpose(1, 2).split([H, Hkv, Hkv], dim=1)
    q = across.transpose(2, 3)  # D is not contiguous
    found = []
    for implementation, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        out = attention(*(x.to(dtype) for x in (q, k, v)), implementation=implementation)
        found.append([out.output, *torch.autograd.grad(out.output.sum(), (qkv, across))])  # a gradient of stride 0
    close(*found)


def test_strided_and_expanded_masks_and_sinks():
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS))
    T = sum(LENGTHS)
    plain = interval_mask(2, T, doc_start=start.repeat(2, 1), doc_end=end.repeat(2, 1), document=True, window=90)
    first = torch.stack([plain.first_key[0], torch.full_like(plain.first_key[0], 77)], -1)[None, :, 0].expand(2, -1)
    inputs = drawn(2, 4, 2, T, 64, torch.bfloat16)
    found = [
        attention(*inputs, mask, sink_logit=sink, statistics=True)
        for mask, sink in (
            (plain, torch.full((4,), 2.0, device=DEVICE)),
            (Mask(rows=2, length=T, first_key=first, doc_start=start.expand(2, -1)),
             torch.tensor([2.0], device=DEVICE).expand(4)),
        )
    ]  # fmt: skip
    assert torch.equal(found[0].output, found[1].output)
    assert all(torch.equal(a, b) for a, b in zip(*(x.statistics for x in found), strict=True))


def enough_memory(gib):
    return pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < gib * 2**30,
        reason=f"takes {gib} GiB of GPU memory",
    )


@enough_memory(40)
def test_offsets_beyond_32_bits_between_heads():
    B, H, T, D = 65, 64, 4096, 128
    torch.manual_seed(0)
    q = torch.randn(B, H, T, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.randn(B, 1, T, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    assert q.numel() > 2**31
    whole = attention(q, k, v, statistics=True)
    grads = torch.autograd.grad(whole.output, (q, k, v), whole.output.detach())
    last = [x.detach()[-1:].clone().requires_grad_() for x in (q, k, v)]
    alone = attention(*last, statistics=True)
    assert torch.equal(whole.output[-1:], alone.output)
    assert torch.equal(whole.statistics.first_key_mass[-1:], alone.statistics.first_key_mass)
    expected = torch.autograd.grad(alone.output, last, alone.output.detach())
    assert all(torch.equal(a[-1:], b) for a, b in zip(grads, expected, strict=True))


@enough_memory(40)
def test_offsets_beyond_32_bits_within_a_head():
    T, H, D, tail = 2**19 + 100, 64, 64, 512
    torch.manual_seed(0)
    q = torch.randn(1, T, H, D, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 1, T, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    assert q.stride(2) * T > 2**31
    out = attention(q, k, v, interval_mask(1, T, window=64, device=DEVICE)).output
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    ends = [x.detach()[:, :, -tail:].double().requires_grad_() for x in (q, k, v)]
    expected = attention(*ends, interval_mask(1, tail, window=64, device=DEVICE), implementation="reference").output
    found_of, expected_of = grads, torch.autograd.grad(expected.sum(), ends)
    inner = slice(-tail + 128, None)  # behind the queries whose window reaches out of the tail
    close([x[:, :, inner] for x in (out, *found_of)], [x[:, :, inner] for x in (expected, *expected_of)])


def test_the_operators_pass_opcheck():
    T = 161
    start, end = (x.to(DEVICE) for x in boundaries([100, 61]))
    mask = interval_mask(1, T, doc_start=start, doc_end=end, document=True, prefix_lm=20)
    q, k, v = (x.requires_grad_() for x in drawn(1, 4, 2, T, 64, torch.float32))
    sink = torch.zeros(4, device=DEVICE, requires_grad=True)
    ends = (mask.first_key, mask.end_key, mask.first_query, mask.last_query)
    arguments = (q, k, v, *ends, start, mask.doc_end, sink, None, 0, 0, 0.125, None, "softmax", False, None, 0.0, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sinkbed.attention_triton.default, arguments, test_utils=tests)
    received = (q.detach(), k.detach(), torch.zeros(1, 4, T, device=DEVICE), *ends[2:], 0, 0, 0.125)
    torch.library.opcheck(torch.ops.sinkbed.attention_received_triton.default, received, test_utils=tests)


def test_inductor_compiles_the_operators_without_a_break():
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS))
    mask = interval_mask(1, sum(LENGTHS), doc_start=start, doc_end=end, document=True)

    def function(q, k, v):
        out = attention(q, k, v, mask, statistics=True)
        return [out.output, *(x for x in out.statistics if x is not None), attention_received(q, k, out.lse, mask)]

    inputs = [x.requires_grad_() for x in drawn(1, 4, 2, sum(LENGTHS), 64, torch.bfloat16)]
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        found = call(*inputs)
        results.append([*found, *torch.autograd.grad(found[0].float().square().sum(), inputs)])
    close(*results)


def test_a_launch_is_ordered_on_the_stream_it_is_made_on():
    inputs = drawn(1, 4, 4, 700, 64, torch.bfloat16)
    expected = attention(*inputs).output
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [x.clone() for x in inputs]  # written only after the wait
        found = attention(*late).output
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_a_launch_goes_to_the_tensors_device():
    inputs = drawn(1, 4, 2, 300, 64, torch.bfloat16)
    results = []
    for device in (0, 1):
        q, k, v = (x.to(f"cuda:{device}").requires_grad_() for x in inputs)
        assert torch.cuda.current_device() == 0
        out = attention(q, k, v, statistics=True)
        grads = torch.autograd.grad(out.output.float().square().sum(), (q, k, v))
        received = attention_received(q, k, out.lse)
        results.append(
            [x.detach().cpu() for x in (out.output, out.lse, out.statistics.first_key_mass, received, *grads)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_mask_of_the_host_is_refused():
    inputs = drawn(1, 1, 1, 6, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="mask: expected its tensors on cuda:0 as q, got cpu"):
        attention(*inputs, interval_mask(1, 6, window=2))


def test_a_compiled_decoder_trains_in_bfloat16():
    from sinkbed.model import Decoder, DecoderConfig

    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        decoder = Decoder(DecoderConfig(n_layers=2, d_model=128, n_heads=4, n_kv_heads=2, d_ff=256), 64).to(DEVICE)
        if compiled:
            decoder.compile()
        optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
        tokens = torch.arange(512, device=DEVICE).remainder(64).view(2, 256)
        for _ in range(30):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = decoder(tokens[:, :-1], targets=tokens[:, 1:].contiguous()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert max(losses) < 1.0 and losses[0] == pytest.approx(losses[1], abs=0.1)
