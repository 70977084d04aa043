"""What a run says of itself, what is never saved, and how it ends."""

import errno
import os

import pytest
import torch
import yaml

from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.run import directory
from sinkbed.train.run.wandb_files import read_wandb_file
from tests.support.runs import points, refused, weights


def test_weights_that_a_step_made_infinite_are_never_saved(fit, capsys):
    status, folder = fit("--model.optimizer.lr", "1e38")
    message = refused(capsys, status)
    assert "step 1 (192 tokens): expected finite weights and moments, got embedding.weight" in message
    assert "no step is saved" in message and directory.newest_checkpoint(folder) is None


def test_a_gradient_that_is_not_finite_is_named(fit, capsys, monkeypatch):
    original = SinkbedModule._normalise

    def spoiled(self):
        self.decoder.head.weight.grad[3, 5] = float("nan")
        return original(self)

    monkeypatch.setattr(SinkbedModule, "_normalise", spoiled)
    status, _ = fit("--model.max_grad_norm", "1.0")
    message = refused(capsys, status)
    assert "gradient norm nan, 1 gradient not finite, head.weight among them" in message


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [("adamw", "head.weight"), ("adamw", "exp_avg_sq of parameter 0"), ("soap", "GG of parameter 0")],
)
def test_what_is_named_good_is_finite(fit, capsys, monkeypatch, optimizer, named):
    """Of a step whose loss and gradient were finite; SOAP keeps lists of tensors, which nothing looked at."""
    if optimizer == "soap":
        pytest.importorskip("pytorch_optimizer")
    original = SinkbedModule.check_weights

    def spoiled(self):
        if self.trainer.global_step == 4:
            state = next(iter(self.trainer.optimizers[0].state.values()))
            tensor = self.decoder.head.weight if named == "head.weight" else state[named.split()[0]]
            with torch.no_grad():
                (tensor[0] if isinstance(tensor, list) else tensor)[3, 5] = float("inf")
        original(self)

    monkeypatch.setattr(SinkbedModule, "check_weights", spoiled)
    status, folder = fit("--model.optimizer.name", optimizer)
    message = refused(capsys, status)
    assert "step 4" in message and "the checkpoints before it are good" in message
    assert named in message
    assert directory.newest_checkpoint(folder).name == "step-0000003.ckpt"
    assert all(torch.isfinite(w).all() for w in weights(folder, 3).values())


MONITOR = {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]}}


def test_points_of_a_callback_are_points_as_any_other_also_after_a_resume(fit, cut, tmp_path):
    overlay = tmp_path / "monitor.yaml"
    overlay.write_text(yaml.safe_dump(MONITOR))
    _, whole = fit("--config", str(overlay), run_dir="whole")
    folder = cut("--config", str(overlay))
    assert fit("--config", str(overlay), "--ckpt_path", "last")[0] == 0
    rates = [p for p in points(whole) if "lr-AdamW/pg1" in p]
    assert [p["train/tokens"] for p in rates] == [4 * 48 * step for step in range(10)]
    assert points(folder) == points(whole)
    for run in (whole, folder):
        rows = [row for f in sorted(run.glob("wandb/offline-run-*/run-*.wandb")) for row in read_wandb_file(f)]
        assert [row["_step"] for row in rows] == list(range(len(points(run))))
        assert [row["train/tokens"] for row in rows] == [p["train/tokens"] for p in points(run)]


def test_a_run_that_a_callback_ends_is_saved_and_not_finished(fit, capsys, tmp_path):
    overlay = tmp_path / "timer.yaml"
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:00:00:01"}}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [timer]}}))
    status, folder = fit("--config", str(overlay), "--trainer.max_steps", "100000", "--checkpoint_every", "100000")
    message = refused(capsys, status)
    step = points(folder)[-1]["step"]
    assert f"a callback ended the run before its step 100000: stopped at step {step}; step {step} is saved" in message
    assert not directory.is_finished(folder)


def test_a_failing_disk_is_one_message(fit, monkeypatch, capsys):
    def fails(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(directory.os, "fsync", fails)
    status, _ = fit("--wandb.mode", "disabled")
    message = refused(capsys, status)
    assert "Input/output error" in message and directory.CONFIG in message and "Traceback" not in message


def test_a_run_says_what_it_is_before_its_first_step_and_where_to_look_at_its_end(fit, capsys):
    _, folder = fit()
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("36.8k parameters, to step 10: 1.92k tokens, 0.1") and f"into {folder}, W&B offline" in first
    )
    assert "52% of the parameters are embeddings of 300 tokens" in second
    assert f"in {folder}: metrics.jsonl" in last and f"sinkbed probe {folder}" in last
    [session] = directory.read_json(folder / directory.RUN)["sessions"]
    assert session["command"].startswith("sinkbed fit --config ") and session["status"] == 0
    assert session["started"] <= session["ended"]
