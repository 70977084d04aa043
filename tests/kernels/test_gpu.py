"""The compiled kernels on a GPU against the float64 reference: `pytest -m gpu`. What the interpreter cannot show:
matrix units, bfloat16 and TF32 as they are, races, launches on a stream."""

import pytest
import torch

from kernels import attention, attention_received, interval_mask
from tests.kernels.test_attention import MASKS, boundaries

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
DEVICE = "cuda"
LENGTHS = [130, 1, 63, 250, 300, 17]  # T 761: no multiple of a tile


def values(implementation, dtype, mask, inputs, sink=None, wanted="full"):
    """Output, lse, statistics, attention received, gradients."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    logit = None if sink is None else sink.to(dtype, copy=True).requires_grad_()
    out = attention(q, k, v, mask, sink_logit=logit, statistics=wanted, implementation=implementation)
    received = attention_received(q, k, out.lse.detach(), mask, implementation=implementation)
    weight = torch.linspace(-1, 1, out.output.numel(), device=DEVICE).view_as(out.output).to(inputs[0].dtype).to(dtype)
    wanted_of = [x for x in (q, k, v, logit) if x is not None]
    grads = torch.autograd.grad((out.output * weight).sum() + out.lse.sum(), wanted_of)
    found = [out.output, out.lse, *(x for x in out.statistics or () if x is not None), received, *grads]
    return [x.detach() for x in found]


def drawn(B, H, Hkv, T, D, dtype):
    torch.manual_seed(0)
    return [torch.randn(B, heads, T, D, device=DEVICE).to(dtype) for heads in (H, Hkv, Hkv)]


def relative(found, expected):
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6))
        for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [32, 64, 96, 128])
def test_values_statistics_and_gradients_equal_the_float64_reference(name, dtype, D):
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS, rows=2))
    mask = interval_mask(2, sum(LENGTHS), doc_start=start, doc_end=end, **MASKS[name](start, end))
    inputs = drawn(2, 4, 2, sum(LENGTHS), D, dtype)
    sink = torch.tensor([-50.0, 0.0, 1.25, 8.0], device=DEVICE)
    expected = values("reference", torch.float64, mask, inputs, sink)
    found = values("triton", dtype, mask, inputs, sink)
    ordinary = values("reference", dtype, mask, inputs, sink)
    floor = 5e-5 if dtype == torch.float32 else 2e-3
    for ours, theirs in zip(relative(found, expected), relative(ordinary, expected), strict=True):
        assert ours <= max(2 * theirs, floor)


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
    plain, some, full = (attention(*inputs, statistics=wanted) for wanted in (False, True, "full"))
    assert torch.equal(plain.output, some.output) and torch.equal(plain.lse, some.lse)
    # The entropy takes other instructions into the loop, which may round differently by one unit.
    torch.testing.assert_close(plain.output, full.output)


def test_large_values_of_one_document_reach_no_other():
    start, end = (x.to(DEVICE) for x in boundaries(LENGTHS))
    mask = interval_mask(1, sum(LENGTHS), doc_start=start, doc_end=end, document=True)
    q, k, v = drawn(1, 2, 2, sum(LENGTHS), 64, torch.bfloat16)
    clean = attention(q, k, v, mask).output
    for x in (q, k, v):
        x[:, :, 131:194] = 1e4
    dirty = attention(q, k, v, mask).output
    assert torch.equal(clean[:, :, :131], dirty[:, :, :131]) and torch.equal(clean[:, :, 194:], dirty[:, :, 194:])


def test_a_compiled_decoder_trains_in_bfloat16():
    from model import Decoder, DecoderConfig

    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        decoder = Decoder(DecoderConfig(layers=2, d_model=128, heads=4, kv_heads=2, d_ff=256), 64).to(DEVICE)
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
