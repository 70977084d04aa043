"""`sinkbed bench attention`: what it takes for a right value, whom it leaves out, what it keeps of a run that fails."""

import csv

import pytest
import torch

from sinkbed.train.bench import attention as bench_attention
from sinkbed.train.bench.attention import error_of, measure
from sinkbed.train.bench.attention_peers import Case
from sinkbed.train.cli.main import main


def case(layout="mixed", length=32, dtype=torch.float32, key_heads=1):
    return Case(
        layout=layout, batch=1, heads=2, key_heads=key_heads, length=length, dim=16, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip


def joined_by(monkeypatch, name, contender):
    original = bench_attention.contenders

    def more(c):
        yield from original(c)
        yield name, contender

    monkeypatch.setattr(bench_attention, "contenders", more)


@pytest.mark.parametrize("place", [0, 1])
def test_nan_counts_in_whichever_tensor_it_is(place):
    tensors = [torch.ones(3), torch.ones(3)]
    tensors[place][0] = float("nan")
    assert not error_of(tensors, [torch.ones(3)] * 2) <= 1.0


def test_values_are_checked_on_the_path_that_is_timed(monkeypatch):
    from sinkbed.kernels.cpu import _BY_DOCUMENT

    lengths = []
    monkeypatch.setattr(bench_attention, "_values", lambda f, x: lengths.append(x[0].shape[2]) or [torch.ones(1)])
    monkeypatch.setattr(bench_attention, "interleave", lambda *_, **__: [])
    long = case(length=1100)
    assert len(long.documents()) > 1
    measure(long, repeats=1)
    assert set(lengths) == {1024} and min(lengths) >= _BY_DOCUMENT


def test_a_bfloat16_contender_may_err_as_an_ordinary_run_does_and_not_more(monkeypatch):
    def rough(q, k, v):
        out = bench_attention.attention(q, k, v, case().mask(), implementation="reference").output
        return out * 1.03

    joined_by(monkeypatch, "rough", rough)
    with pytest.raises(ValueError, match="rough: expected values within"):
        measure(case(dtype=torch.bfloat16), repeats=1)


def test_a_peer_that_refuses_or_has_no_memory_is_left_out_and_we_are_not(monkeypatch):
    def short_of_memory(q, k, v):
        if q.shape[2] > 1024:
            raise torch.OutOfMemoryError("no memory for this")
        return bench_attention.attention(q, k, v, case(length=q.shape[2]).mask(), implementation="reference").output

    joined_by(monkeypatch, "hungry", short_of_memory)
    timings, absent = measure(case(length=1040), repeats=1)
    assert absent == {"hungry": "no memory for this"} and "Sinkbed" in timings and "hungry" not in timings

    def refuses(*_, **__):
        raise RuntimeError("no kernel of ours")

    joined_by(monkeypatch, "Sinkbed", refuses)
    with pytest.raises(RuntimeError, match="no kernel of ours"):
        measure(case(), repeats=1)


def test_the_csv_holds_the_cases_before_one_that_fails(monkeypatch, tmp_path):
    original = bench_attention.measure

    def fails_later(c, repeats):
        if c.length == 48:
            raise ValueError("expected: a failure")
        return original(c, repeats)

    monkeypatch.setattr(bench_attention, "measure", fails_later)
    monkeypatch.setattr(bench_attention, "peak", lambda *_: (0.0, "not measured"))
    path = tmp_path / "bench.csv"
    sizes = ["--lengths", "32", "48", "--dims", "16", "--heads", "2", "--layouts", "causal", "--batch", "1"]
    assert main(["bench", "attention", *sizes, "--threads", "1", "--repeats", "1", "--csv", str(path)]) == 1
    with path.open() as file:
        assert {r["T"] for r in csv.DictReader(file)} == {"32"}


def test_sdpa_shares_key_heads_instead_of_copying_them(monkeypatch):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda q, k, v, **options: calls.append((k.shape[1], options["enable_gqa"])) or sdpa(q, k, v, **options),
    )  # fmt: skip
    one = case(layout="causal")
    for name, contender in bench_attention.contenders(one):
        if name.startswith("SDPA"):
            contender(*one.inputs())
    assert calls == [(1, True), (1, True)]


def test_float32_on_a_gpu_has_no_share_of_a_16_bit_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda")
    assert bench_attention.peak(gpu, torch.bfloat16)[0] == 989e12
    assert bench_attention.peak(gpu, torch.float32) == (0.0, "NVIDIA H100 80GB HBM3: not known for float32")
