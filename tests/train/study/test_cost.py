"""What a study takes: counted as the model counts, printed before anything starts, refused where it does not fit."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.attention_parts import ATTENTION_PARTS
from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.study import cost as planning
from sinkbed.train.study import local as runner
from sinkbed.train.study.arms import plan
from sinkbed.train.study.file import load_study
from tests.support.runs import write_run_config


@pytest.fixture
def study(tiny_store, tmp_path):
    """Two arms, one with a window."""
    write_run_config(tmp_path / "run.yaml", tiny_store)
    path = tmp_path / "study.yaml"
    path.write_text(
        f"title: A study\nout: {tmp_path / 'deep' / 'out'}\nbase: [run.yaml]\nseeds: [0, 1]\n"
        "arms: {all: [], window: [{data: {strategy: {window: 8}}}]}\n"
    )
    return path


@pytest.mark.parametrize(
    "shape",
    [
        {"n_heads": 4, "d_ff": 20},
        {"n_heads": 4, "n_kv_heads": 1, "head_dim": 6, "d_ff": 20, "tie_embeddings": True},
        {"n_heads": 2, "d_ff": 24, "sink": "learned"},
        {"n_heads": 2, "d_ff": 24, "sink": "off_by_one"},
        *({"n_heads": 2, "d_ff": 24, "attention_parts": [part]} for part in ATTENTION_PARTS.names),
    ],
)
def test_parameters_are_those_of_the_decoder(shape):
    config = DecoderConfig(n_layers=3, d_model=16, **shape)
    assert Decoder.parameters_of(config, 50) == Decoder(config, 50).parameter_count()


def test_flops_are_those_of_the_matrix_products():
    """Counted by torch in the forward pass of a model whose attention is dense: T keys a query instead of T / 2."""
    from torch.utils.flop_counter import FlopCounterMode

    config, length = DecoderConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48), 64
    decoder = Decoder(config, 100)
    decoder.implementation = "reference"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(torch.zeros(1, length, dtype=torch.int64))
    half = planning.training_flops(config, 100, length, window=None)
    dense = half + 12 * config.n_layers * config.n_heads * config.dim * length / 2
    assert 3 * counter.get_total_flops() / length == pytest.approx(dense, rel=0.02)
    assert planning.training_flops(config, 100, length, window=8) < half
    assert planning.training_flops(config, 100, length, None, checkpointing=True) == pytest.approx(half * 4 / 3)


def test_a_plan_says_what_it_takes_and_runs_nothing(study, capsys):
    assert main(["study", str(study), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "A study: 4 runs" in out and "2 new" in out
    assert "3,840" in out and "7,680" in out, "tokens: 10 steps × 4 rows × 48, under two seeds; and all"
    assert "A100, h" in out and "assumed" in out and "GB" in out
    assert not (study.parent / "deep").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data: {context_length: 1000000}", r"arm long: context_length 1000000 but the split 'train' has only"),
        ("measure: {sink_tokens: 3000}, data: {context_length: 4000}", "arm long: measure.sink_tokens=3000"),
    ],
)
def test_a_plan_refuses_what_the_token_store_that_is_there_is_too_small_for(study, setting, message, capsys):
    """Regression: it was planned as if there were enough, and every run of the arm failed."""
    study.write_text(study.read_text().replace("all: []", f"all: [], long: [{{{setting}}}]"))
    assert main(["study", str(study), "--dry_run"]) == 1
    assert message in capsys.readouterr().err


def test_a_plan_says_which_vocabulary_it_takes_a_store_to_have(study, capsys):
    study.write_text(study.read_text().replace("all: []", "all: [{data: {store: stores/misspelt}}]"))
    assert main(["study", str(study), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "Token store stores/misspelt is not there yet" in out and "vocabulary is taken to be 32,768" in out


def test_each_arm_has_the_vocabulary_of_the_data_config_that_makes_its_store(study, capsys):
    for size in (300, 400):
        text = f"out: {'~/' if size == 400 else ''}stores/of-{size}\ntokenizer: {{vocab_size: {size}}}\n"
        (study.parent / f"data-{size}.yaml").write_text(text)
    arms = "a: [{data: {store: stores/of-300}}], b: [{data: {store: ~/stores/of-400}}]"
    study.write_text(study.read_text().replace("all: []", arms) + "prepare: [data-300.yaml, data-400.yaml]\n")
    assert main(["study", str(study), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for size in (300, 400):
        assert f"data-{size}.yaml --dry_run` estimates it; its vocabulary is taken to be {size}" in out


@pytest.mark.slow
def test_the_rate_of_a_core_is_measured_once_there_are_arms(study, capsys):
    assert main(["study", str(study), "--quiet", "--seeds", "0"]) == 0
    capsys.readouterr()
    assert main(["study", str(study), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "measured in the arms that are finished" in out and "1 finished, 1 new" in out and "not finished" in out
    loaded = load_study(study)
    runs = plan(loaded)
    rate, _ = planning.core_rate(loaded, runs)
    seconds = [sum(directory.read_json(r.folder / directory.MEASUREMENT)["seconds"].values()) for r in runs[:2]]
    assert rate == pytest.approx(sum(planning.cost(loaded, r).flops for r in runs[:2]) / sum(seconds))
    # Log-spaced ones stay however seldom others are saved; what is no weight or moment is large in so small a model.
    sizes = [f.stat().st_size for f in (runs[0].folder / "checkpoints").glob("step-*.ckpt")]
    cost = planning.cost(loaded, runs[0])
    planned = cost.disk // (12 * cost.parameters)
    assert len(sizes) < planned <= len(sizes) + 3, "as many as there are, and one that is being written"
    assert all(12 * cost.parameters <= size for size in sizes)


def test_log_spaced_checkpoints_are_counted_however_seldom_others_are_saved(study):
    study.write_text(
        study.read_text().replace("[run.yaml]", "[run.yaml, {checkpoint_every: 100, checkpoint_points: 6}]")
    )
    cost = planning.cost(loaded := load_study(study), plan(loaded)[0])
    kept = {1, 2, 3, 4, 6, 10}
    assert directory.kept_steps(6, 10) == kept
    assert cost.disk == 12 * cost.parameters * (len(kept) + 3), "newest, best, being written"


def test_what_cannot_fit_or_is_no_config_is_refused_before_preparing(study, tiny_store, capsys, monkeypatch):
    prepared = []
    monkeypatch.setattr("sinkbed.train.cli.prepare.run", lambda command, argv: prepared.append(argv) or 0)
    text = study.read_text()
    (study.parent / "data.yaml").write_text("out: not_yet\n")
    base = "[run.yaml, {trainer: {max_steps: -1}}]"
    wrong = {
        ("window: 8", "windw: 8"): "windw",
        ("[run.yaml]", base): "trainer.max_steps: expected at least 1",
        ("", ""): "GB free for the",
    }
    for change, told in wrong.items():
        study.write_text(text.replace(*change) + "prepare: data.yaml\n")
        if change == ("", ""):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        for agent in ([], ["--arm", "window", "--force"]):
            assert main(["study", str(study), "--quiet", *agent]) == 1
            assert told in capsys.readouterr().err and not prepared


def test_a_disk_that_is_too_small_is_refused_before_anything_starts(study, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for option in ("--dry_run", "--quiet"):
        assert main(["study", str(study), option]) == 1
        said = capsys.readouterr()
        assert "GB free for the checkpoints of 4 runs, got 1e-06 GB" in said.err
        assert ("A study: 4 runs" in said.out) == (option == "--dry_run"), "the plan is printed all the same"
    assert not (study.parent / "deep" / "out" / "runs").exists()


def test_gpus_that_are_not_there_are_refused(study, capsys, monkeypatch):
    monkeypatch.setattr(runner, "visible_gpus", lambda: [])
    text = study.read_text()
    study.write_text(text + "gpus: 1\n")
    assert main(["study", str(study), "--quiet"]) == 1
    assert "study.gpus: expected 1 for each arm, got 0 on this machine; use --ray" in capsys.readouterr().err
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert main(["study", str(study), "--quiet"]) == 1
        error = capsys.readouterr().err
        assert "got 0 on this machine" in error and "GB free for the checkpoints" in error, "all that is too small"
    study.write_text(text.replace("[run.yaml]", "[run.yaml, {trainer: {accelerator: gpu}}]"))
    assert main(["study", str(study), "--quiet"]) == 1
    assert "asks for a GPU (trainer.accelerator), and the study gives its arms none" in capsys.readouterr().err


def test_a_head_dim_that_the_gpu_kernels_do_not_take_is_refused(study, capsys):
    """By what is asked for, so that a machine without a GPU says it too, and one with CPU arms never."""
    text = study.read_text().replace("[run.yaml]", "[run.yaml, {model: {decoder: {head_dim: 8}}}]")
    study.write_text(text)
    assert main(["study", str(study), "--dry_run"]) == 0
    study.write_text(text.replace("head_dim: 8}}", "head_dim: 8}}, trainer: {accelerator: auto}") + "gpus: 1\n")
    assert main(["study", str(study), "--dry_run"]) == 1
    assert "arm all: head dim" in (error := capsys.readouterr().err) and "16, 32, 64, 96, 128, 256; got 8" in error


def test_memory_that_is_too_small_is_refused(study, capsys, monkeypatch):
    monkeypatch.setattr(planning, "_memory", lambda: 1_000_000_000)
    assert main(["study", str(study), "--quiet", "--workers", "4"]) == 1
    assert "4 arms at a time: expected" in capsys.readouterr().err
    assert main(["study", str(study), "--dry_run", "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("gpus", "workers", "places"),
    [
        (1, None, ["4", "5", "7"]),
        (0.5, None, ["4", "5", "7", "4", "5", "7"]),
        (2, None, ["4,5"]),
        (1, 2, ["4", "5"]),
    ],
)
def test_arms_side_by_side_have_gpus_of_their_own(study, monkeypatch, gpus, workers, places):
    monkeypatch.setattr(runner, "visible_gpus", lambda: ["4", "5", "7"])
    study.write_text(study.read_text() + f"gpus: {gpus}\n" + (f"workers: {workers}\n" if workers else ""))
    assert [p["CUDA_VISIBLE_DEVICES"] for p in runner.slots(load_study(study))] == places


def test_without_a_number_of_workers_there_is_one_for_the_cores_of_each(study, monkeypatch):
    monkeypatch.setattr(runner, "available_cores", lambda: 8)
    study.write_text(study.read_text() + "cpus: 3\n")
    assert len(runner.slots(load_study(study))) == 2
