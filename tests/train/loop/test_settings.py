"""Settings that are refused, or answered with a word, before anything is trained."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from sinkbed.data.pack.strategy import Strategy
from sinkbed.train.cli.main import main
from sinkbed.train.loop.settings import unmeasured_input
from tests.support.runs import refused


@pytest.mark.parametrize(
    ("line", "key"),
    [("data: {context_length: 1}", "data.context_length"), ("data: {strategy: {window: 0}}", "data.strategy.window")],
)
def test_a_refusal_names_the_line_of_the_key(fit, tmp_path, capsys, line, key):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"threads: 1\n{line}\n")
    assert f"overlay.yaml, line 2: {key}: expected" in refused(capsys, fit("--config", str(overlay))[0])
    status, _ = fit("--config", str(overlay), f"--{key}", "-1")
    assert refused(capsys, status).startswith(f"sinkbed fit: {key}: expected"), "of an option there is none"


@pytest.mark.parametrize(
    ("first_token", "modes", "said"),
    [("[none, bos]", "[bos, text]", "with none, bos; "), ("[none, bos]", "[as_trained]", ""), ("none", "[text]", ""),
     ("random", "[bos, first_key_masked]", "with random; "), ("bos", "[bos]", ""),
     ("none", "[bos]", "with the text; ")],
)  # fmt: skip
def test_that_the_input_of_training_is_not_measured_is_said(first_token, modes, said):
    data = SimpleNamespace(strategy=Strategy(first_token=yaml.safe_load(first_token)))
    measure = SimpleNamespace(modes=yaml.safe_load(modes))
    line = unmeasured_input(SimpleNamespace(data=data, measure=measure))
    assert said in line and bool(said) == bool(line)


@pytest.mark.parametrize("option", ["limit_train_batches=3", "max_epochs=1", "logger=true", "fast_dev_run=true"])
def test_a_trainer_setting_without_effect_is_refused(fit, capsys, option):
    assert "has no effect here" in refused(capsys, fit(f"--trainer.{option}")[0])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--model.decoder.n_heads", "3"), "d_model: expected a multiple of n_heads=3"),
        (("--data.store", "nowhere"), "nowhere"),
        (("--data.context_length", "1000000"), "1000000"),
        (("--data.batch_size", "4", "--data.micro_batch_size", "3"), "expected a multiple of micro_batch_size=3"),
        (("--trainer.max_steps", "-1"), "trainer.max_steps: expected at least 1"),
        (
            ("--model.decoder.position", "{learned: {length: 8}}"),
            "measured, got 8; set {learned: {length: 48}}",
        ),
        (
            (
                "--model.decoder.position",
                "{learned: {length: 48}}",
                "--data.strategy.first_token",
                "[bos, bos]",
                "--measure.modes",
                "[as_trained]",
            ),
            "expected at least 49 positions",
        ),
        (
            ("--model.decoder.position", "alibi", "--data.strategy.prefix_lm", "4"),
            "expected no keys ahead, got data.strategy.prefix_lm=4",
        ),
        (
            ("--model.decoder.position", "alibi", "--data.strategy.positions", "document"),
            "data.strategy.positions: expected row, or mask: intra_document",
        ),
        (
            (
                "--model.decoder.n_registers",
                "1",
                "--data.strategy.mask",
                "intra_document",
                "--data.strategy.shared_prefix",
                "2",
            ),
            "data.strategy.shared_prefix=2, got first_key_masked; leave it out",
        ),
        (
            ("--model.decoder.n_registers", "1000"),
            "n_registers: expected at most data.context_length=48, got 1000; rows",
        ),
        (
            ("--model.decoder.d_ff", "0"),
            "d_ff: expected at least 1 beside feed_forward 'swiglu', got 0, which none and",
        ),
        (("--model.optimizer.lr", "-1"), "model.optimizer.lr: expected more than 0, got -1"),
        (("--model.decoder.position", "{rope: {share: 0.01}}"), "expected an even number of dimensions to turn"),
        (("--model.decoder.normalizer", "sigmoid", "--model.decoder.sink", "learned"), "sink: expected none beside"),
        (("--model.decoder.feed_forward", "none"), "d_ff: expected 0 beside feed_forward none, got"),
        (("--trainer.accumulate_grad_batches", "2"), "set data.micro_batch_size"),
        (("--threads", "0"), "threads: expected at least 1"),
        (("--trainer.log_every_n_steps", "0"), "trainer.log_every_n_steps: expected at least 1"),
        (("--trainer.precision", "16-mixed"), "expected bf16-mixed, bf16-true or 32-true, got 16-mixed"),
        (("--trainer.precision", "16"), "got 16, which overflows"),
        (("--trainer.precision", "16-true"), "got 16-true, which overflows"),
        (("--trainer.strategy", "fsdp"), "expected one of auto, ddp, fsdp2, fsdp2_sharded; got fsdp"),
        (("--trainer.strategy", "ddp_spawn"), "fsdp2_sharded; got ddp_spawn"),
        (("--trainer.accelerator", "cuda"), "trainer.accelerator: expected one that this machine has, got cuda"),
        (("--trainer.devices", "x"), "trainer.devices: expected auto or a number, got 'x'"),
        (("--seed_everything", "-5"), "seed_everything: expected at least 0"),
        (("--ckpt_path", "lst"), "--ckpt_path lst: expected last, auto or a checkpoint of this run"),
        (("--trainer.use_distributed_sampler", "true"), "trainer.use_distributed_sampler: has no effect"),
        (("--model.optimizer.warmup_steps", "11"), "do not fit into trainer.max_steps=10"),
        (("--measure.sink_tokens", "64"), "measure.sink_tokens=64"),
        (("--data.strategy.window", "0"), "window"),
    ],
)
def test_a_wrong_setting_is_one_message(fit, capsys, extra, message):
    try:
        status, _ = fit(*extra)
    except SystemExit as stop:  # the parser's own refusals
        status = stop.code
    error = refused(capsys, status)
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_key_is_an_error(fit, capsys):
    with pytest.raises(SystemExit):
        fit("--model.decoder.headz", "3")
    assert "headz" in capsys.readouterr().err


def test_a_missing_config_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err


def test_bf16_is_refused_on_a_cpu_that_lacks_it(fit, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    status, folder = fit("--trainer.precision", "bf16-mixed")
    assert status == 1 and not folder.exists()
    assert "trainer.precision: expected 32-true on a CPU without arithmetic in bfloat16" in capsys.readouterr().err


def test_a_machine_without_a_compiler_says_so_before_training(fit, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "nowhere++")
    status, folder = fit("--model.compile", "true")
    assert status == 1 and not folder.exists()
    assert "model.compile: expected a C++ compiler, got no nowhere++ on this machine" in capsys.readouterr().err
