"""`sinkbed bench`: what it reports, on inputs too small to time."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
import yaml

from sinkbed.kernels.normalizers import NORMALIZERS
from sinkbed.model import Decoder
from sinkbed.model.attention_parts import ATTENTION_PARTS
from sinkbed.model.config import PARTS, DecoderConfig
from sinkbed.train.bench import attention as bench_attention
from sinkbed.train.bench import measure as bench_metering
from sinkbed.train.bench import prepare as bench_prepare
from sinkbed.train.bench.attention_peers import Case
from sinkbed.train.bench.data import PACKINGS
from sinkbed.train.bench.parts import variants
from sinkbed.train.cli import bench
from sinkbed.train.cli.main import main


def case(layout, length=64, heads=4, key_heads=2):
    return Case(
        layout=layout, batch=2, heads=heads, key_heads=key_heads, length=length, dim=16, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("layout", bench_attention.LAYOUTS)
def test_a_layout_fills_the_row_and_its_work_is_that_of_the_mask(layout):
    one = case(layout, length=700)
    lengths = one.documents()
    assert sum(lengths) == 700 and min(lengths) > 0
    assert (len(lengths) > 1) == (layout != "causal")
    pairs = int(one.mask().visible().sum()) * one.heads
    # 2·D·len² counts half a square a document; the diagonal makes it a little less than what is visible.
    assert one.flops() == pytest.approx(4 * one.dim * pairs, rel=len(lengths) / 100)


def test_the_table_and_the_csv_hold_every_contender_and_pass(capsys, tmp_path):
    path, plot = tmp_path / "out" / "bench.csv", tmp_path / "bench.png"
    sizes = ["--lengths", "32", "64", "--dims", "16", "--heads", "2", "--kv_heads", "1"]
    options = [*sizes, "--threads", "1", "--repeats", "1"]
    assert main(["bench", "attention", *options, "--csv", str(path), "--plot", str(plot)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = {"Sinkbed", "Sinkbed + statistics", "SDPA flash", "SDPA math", "eager + statistics"}
    found = {(r["layout"], r["T"], r["contender"], r["pass"]) for r in rows}
    passes = ("forward", "forward + backward")
    assert found == {(la, t, n, p) for la in ("causal", "mixed") for t in ("32", "64") for n in names for p in passes}
    assert all(float(r["ms"]) > 0 and float(r["ratio"]) > 0 and float(r["of_peak"]) > 0 for r in rows)
    assert all(float(r["ratio"]) == 1 for r in rows if r["contender"] == "Sinkbed")
    assert plot.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert all(name in output for name in names)


def test_a_contender_with_wrong_values_is_not_timed(monkeypatch):
    original = bench_attention.contenders

    def with_a_fault(c):
        yield from original(c)
        yield "no mask", lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    monkeypatch.setattr(bench_attention, "contenders", with_a_fault)
    with pytest.raises(ValueError, match="no mask: expected values within"):
        bench_attention.measure(case("mixed"), repeats=1)


def test_the_loader_is_compared_with_what_the_model_consumes(capsys, tiny_store, fit):
    options = ["--config", str(fit.config), "--store", str(tiny_store), "--repeats", "1", "--parts", "loader"]
    assert main(["bench", "data", *options]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    names = ["model, one training step", "loader, no workers", "loader, 1 workers"]
    assert [line[:28].strip() for line in lines[2:]] == names
    rates = [float(line[28:42].replace(",", "")) for line in lines[2:]]
    ratios = [float(line.split()[-2]) for line in lines[2:]]
    assert ratios == pytest.approx([rate / rates[0] for rate in rates], abs=0.06)


def test_packings_are_compared_by_rate_and_by_what_they_leave_out(capsys, tiny_store, fit):
    options = ["--store", str(tiny_store), "--repeats", "1", "--length", "64", "--batch", "4"]
    assert main(["bench", "data", "--config", str(fit.config), "--parts", "packing", *options]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert [line[:24].strip() for line in lines[2:]] == list(PACKINGS)
    padded = {line[:24].strip(): float(line[24:].split()[3]) for line in lines[2:]}
    assert padded["concat"] == padded["best_fit, fill: repeat"] == 0 < padded["best_fit"] < padded["pad"]
    assert all(float(value) > 0 for line in lines[3:] for value in line[24:].split()[:3])


@pytest.mark.slow
def test_memory_is_measured_on_generated_stores_that_are_removed(capsys, fit, tmp_path):
    sizes = ["--megabytes", "1", "--length", "64", "--batch", "4", "--batches", "3"]
    assert main(["bench", "data", "--parts", "memory", "--scratch", str(tmp_path), *sizes]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [["concat", "1", "MB"], ["best_fit", "1", "MB"]]
    documents = [int(line.split()[3].replace(",", "")) for line in lines[2:]]
    assert documents[0] == documents[1] > 500
    assert not list(tmp_path.glob("sinkbed-bench-*"))


@pytest.mark.slow
def test_saving_and_resuming_are_measured_on_real_runs(capsys, fit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(fit.config), "--resume", str(fit.config), "--vocab_size", "300", "--repeats", "1"]
    assert main(["bench", "checkpoint", *config]) == 0
    output = capsys.readouterr().out
    assert "saves at most in 10 steps of 2 s" in output and output.count("s to the first new step") == 2
    assert not list(tmp_path.glob(".bench*"))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = (f"document {i} " + "has words and more words " * (i % 9 + 8) for i in range(200))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.slow
def test_preparing_is_compared_on_the_same_text(capsys, corpus, tmp_path):
    options = ["--vocab_size", "300", "--repeats", "1", "--copies", "2", "--folder", str(tmp_path)]
    assert main(["bench", "prepare", "--file", str(corpus), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = 2 * sum(len(json.loads(line)["text"]) for line in corpus.read_text().splitlines())
    assert lines[0].startswith(f"{size / 1e6:.1f} MB of text") and "vocabulary 300; 2 threads" in lines[0]
    rows = {line[:24].strip(): line[24:].split() for line in lines[2:] if "×" in line}
    assert set(rows) == {"tokenizers, in memory", "Sinkbed", "datasets.map, blocks"}
    base = float(rows["tokenizers, in memory"][0])
    for seconds, megabytes, tokens, ratio, *_ in rows.values():
        assert float(seconds) > 0 and float(megabytes) >= 0 and float(tokens.replace(",", "")) > 0
        least, most = (base - 0.005) / (float(seconds) + 0.005), (base + 0.005) / (float(seconds) - 0.005)
        assert least - 0.005 <= float(ratio[:-1]) <= most + 0.005  # all are printed to hundredths
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"], "nothing is left behind"


def test_a_contender_that_loses_tokens_is_not_compared(monkeypatch, corpus):
    def measured(_, name, job):
        return bench_prepare.Turn(1.0, 99 if name == "Sinkbed" else 100, 0)

    monkeypatch.setattr(bench_prepare, "in_new_process", measured)
    with pytest.raises(ValueError, match="Sinkbed: expected 100 tokens, got 99"):
        bench.run("bench", ["prepare", "--file", str(corpus), "--vocab_size", "300", "--repeats", "1"])


TINY = ["--layers", "2", "--hidden", "16", "--heads", "2", "--kv_heads", "1", "--ffn", "24", "--vocab_size", "50"]


@pytest.mark.slow
def test_measuring_is_compared_with_eager_attention_on_the_same_model(capsys, fit, monkeypatch):
    monkeypatch.setattr(bench_metering, "in_new_process", lambda turn, *arguments: turn(*arguments))
    sizes = [*TINY, "--length", "256", "--documents", "3", "--tokens", "16", "--decoder_vocab_size", "60"]
    options = ["--config", str(fit.config), "--repeats", "1", "--threads", "1", "--draws", "3", "--directions", "8"]
    assert main(["bench", "measure", *sizes, *options]) == 0
    output = capsys.readouterr().out
    lines = {line[:34].strip(): line[34:].split() for line in output.splitlines()}
    for logits in ("no logits", "logits too"):
        ours, eager = (lines[f"{way}, {logits}"] for way in bench_metering.WAYS)
        assert float(ours[0]) > 0 and float(eager[0]) > 0 and ours[1] == "1.00"
        assert eager[2] == "unknown" or float(eager[2].replace(",", "")) >= 0
    assert output.count("the masses of both differ by") == 2
    _, table = output.split("measuring 3 documents of 16 tokens, seconds\n")
    measured = [line.split() for line in table.splitlines()[1:3]]
    assert [line[0] for line in measured] == ["Llama", str(fit.config)]
    assert all(float(seconds) >= 0 for line in measured for seconds in line[2:])
    assert "4 documents of 16 tokens, 8 of 32 directions, 3 draws" in table
    layers = [line.split() for line in table.splitlines() if "%" in line]
    assert [line[0] for line in layers] == ["1", "2"] and all(float(line[2][:-1]) > 0 for line in layers)


def test_the_sampled_jacobian_of_a_run_is_compared_with_its_exact_one(capsys, fit):
    assert fit("--wandb.mode", "disabled")[0] == 0
    capsys.readouterr()
    options = ["--run", str(fit.config.parent / "run"), "--tokens", "16", "--jacobian_documents", "2"]
    # All directions of the width are the exact Jacobian, whatever the draw.
    assert main(["bench", "measure", "--parts", "jacobian", *options, "--directions", "32", "--draws", "1"]) == 0
    output = capsys.readouterr().out
    assert "run, step 10: 2 documents of 16 tokens, 32 of 32 directions" in output
    assert [line.split()[2:] for line in output.splitlines() if "%" in line] == [["0.0%", "0.0%", "0.0%"]] * 2


def test_ways_whose_masses_differ_are_not_compared():
    turns = {
        way: [bench_metering.Turn(1.0, 0, torch.full((1, 2, 3), 0.5 + i / 1000))]
        for i, way in enumerate(bench_metering.WAYS)
    }
    with pytest.raises(ValueError, match=r"masses of both ways within 1e-05, got 1\.0e-03"):
        bench_metering.masses_differ(turns)


@pytest.mark.slow
def test_one_long_line_is_compared_with_the_same_bytes_as_many(capsys):
    assert main(["bench", "prepare", "--long_line", "1", "--vocab_size", "300", "--workers", "1"]) == 0
    many, one = (line.split() for line in capsys.readouterr().out.splitlines())
    assert many[:2] == ["many", "lines"] and one[:2] == ["one", "line"] and many[2] == one[2]
    assert 50 < float(one[-2].replace(",", "")) < 1_500, "MB"


@pytest.mark.slow
def test_fit_is_compared_with_a_loop(capsys, fit, tmp_path):
    command = ["bench", "fit", "--config", str(fit.config), "--repeats", "1", "--steps", "100"]
    assert main([*command, "--batch", "4"]) == 0
    size, ours, loop, ratio = capsys.readouterr().out.rstrip().splitlines()
    rate, bare = (float(line[12:].split()[0].replace(",", "")) for line in (ours, loop))
    assert size.startswith("4 rows of ") and float(ratio.split()[2]) == pytest.approx(rate / bare, abs=0.01)
    assert main([*command, "--length", "1"]) == 1
    assert "sinkbed bench: sinkbed fit: data.context_length: expected" in capsys.readouterr().err
    other = tmp_path / "muon.yaml"
    other.write_text(
        yaml.safe_dump(yaml.safe_load(fit.config.read_text()) | {"model": {"optimizer": {"name": "muon"}}})
    )
    assert main(["bench", "fit", "--config", str(other)]) == 1
    assert "expected a run with adamw, a causal mask" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_step_in_float32_and_bfloat16(capsys, fit):
    shape = ["--layers", "1", "--d_model", "32", "--batch", "1", "--length", "16", "--repeats", "1"]
    assert main(["bench", "training", "--config", str(fit.config), "--bfloat16", *shape]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 rows of 16 tokens" in lines[0]
    names = ["HF Llama", "Sinkbed", "HF Llama, bfloat16", "Sinkbed, bfloat16"]
    assert [line[:24].strip() for line in lines[2:6]] == names and lines[2].split()[4] == "1.00"


def test_every_variant_of_every_part_takes_a_step(capsys, fit):
    names = [name for registry in PARTS.values() for name in registry.names] + ATTENTION_PARTS.names
    command = ["bench", "parts", "--config", str(fit.config), "--batch", "1", "--length", "16", "--repeats", "1"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].startswith("base") and lines[0].endswith("1.00")
    assert len(lines) == 1 + len(names) - len(PARTS) + 2  # the base's own variants are no others; soft cap, register
    assert main([*command, "--operator"]) == 0
    timed = [line[:36].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert timed[0] == "softmax" and {*NORMALIZERS.names, "softcap", "ALiBi", "KV bias"} <= {*timed}


_BASE = DecoderConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=24)


@pytest.mark.parametrize("name", variants(_BASE)[0])
def test_every_variant_trains_in_bfloat16(name):
    """Under autocast, as `trainer.precision: bf16-mixed`: nearly the loss of float32, and every gradient is finite."""
    torch.manual_seed(0)
    decoder = Decoder(variants(_BASE)[0][name], 32)
    tokens = torch.arange(32).view(2, 16)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = decoder(tokens, statistics=True).logits
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()))
    losses[1].backward()
    assert abs(losses[1] - losses[0]) < 0.02
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


def test_variants_that_do_not_go_with_the_base_are_named():
    base = DecoderConfig(n_layers=1, d_model=16, n_heads=2, d_ff=0, feed_forward="none", sink="learned")
    made, left_out = variants(base)
    assert made["feed_forward: gelu"].d_ff == 64 and made["position: none"].d_ff == 0
    assert left_out == ["normalizer: elu", "normalizer: sigmoid", "normalizer: softpick"]


@pytest.mark.parametrize("value", ["-1", "0", "two"])
def test_counts_of_a_benchmark_are_at_least_one(value, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "training", "--batch", value])
    assert f"--batch: expected a whole number of at least 1, got '{value}'" in capsys.readouterr().err


def test_documents_of_one_token_are_compared_although_their_gradients_are_none(capsys):
    options = ["--lengths", "1", "--layouts", "even", "--dims", "16", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", "attention", *options]) == 0
    assert "T 1, D 16" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU only")
def test_a_gpu_that_is_not_there_is_no_device_of_a_benchmark(capsys):
    assert main(["bench", "attention", "--device", "cuda"]) == 1
    assert "--device: expected a device that is here, got cuda" in capsys.readouterr().err
