"""`sinkbed fit` as users run it: the run directory, resume, refusals, faults."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from sinkbed.data.files import write_json
from sinkbed.train.cli.main import main
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.run import directory
from sinkbed.train.run.wandb_files import read_wandb_file
from tests.support.runs import Killed, killed_at, points, refused, weights


def test_a_run_leaves_everything_its_reader_needs(fit):
    status, folder = fit()
    assert status == 0
    for name in (
        directory.CONFIG,
        directory.MANIFEST,
        directory.AUDIT,
        directory.METRICS,
        directory.MEASUREMENT,
        directory.RUN,
    ):
        assert (folder / name).stat().st_size > 0, name
    found = points(folder)
    assert [p["train/tokens"] for p in found] == [4 * 48 * p["step"] for p in found]
    assert [p["step"] for p in found] == sorted(p["step"] for p in found)
    training = [p for p in found if "train/loss" in p]
    assert [p["step"] for p in training] == list(range(1, 11))
    assert training[0]["train/loss"] > training[-1]["train/loss"], "the tiny model learns"
    measured = [p for p in found if "sink/rate_eps0.3/bos" in p]
    assert [p["step"] for p in measured] == [0, 2, 4, 10]
    keys = set(measured[-1])
    for mode in ("bos", "text", "first_key_masked"):
        assert {f"val/loss/{mode}", f"val/bits_per_byte/{mode}", f"sink/mass/{mode}"} <= keys
        assert {f"sink/rate_eps{e}/{mode}" for e in (0.2, 0.3, 0.5, 0.8)} <= keys
        assert {f"sink/mass/layer{layer}/{mode}" for layer in range(2)} <= keys
        assert torch.tensor(measured[-1][f"sink/heatmap/{mode}"]).shape == (2, 2)
    assert {"sink/packed_document_mass", "sink/packed_first_key_mass"} <= keys
    final = directory.read_json(folder / directory.MEASUREMENT)
    assert final["modes"]["bos"]["documents"] == 6, "all documents; the curves keep to the first three"
    assert 0 < final["seconds"]["training"] < 60
    assert final["tokens"] == 10 * 4 * 48


def test_the_same_seed_gives_the_same_run_bit_for_bit(fit):
    _, a = fit(run_dir="a")
    _, b = fit(run_dir="b")
    _, c = fit("--seed_everything", "1", run_dir="c")
    assert points(a) == points(b)
    assert points(a) != points(c)


def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(fit):
    _, whole = fit(run_dir="whole")
    _, parts = fit("--data.micro_batch_size", "1", run_dir="parts")
    first = [next(p["train/loss"] for p in points(f) if "train/loss" in p) for f in (whole, parts)]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


@pytest.mark.parametrize(
    "extra",
    [
        (),
        pytest.param(("--data.micro_batch_size", "2"), marks=pytest.mark.slow),
        pytest.param(("--data.workers", "1"), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights_and_points(fit, extra):
    _, whole = fit(*extra, run_dir="whole")
    with killed_at(7):
        fit(*extra, run_dir="cut")
    folder = whole.parent / "cut"
    assert points(folder)[-1]["step"] > 4, "points after the checkpoint exist and must be made again"
    identifier = directory.read_json(folder / directory.RUN)["wandb_id"]
    assert fit(*extra, "--ckpt_path", "last", run_dir="cut")[0] == 0
    assert points(folder) == points(whole)
    ours, theirs = weights(folder, 10), weights(whole, 10)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert directory.read_json(folder / directory.RUN)["wandb_id"] == identifier
    measured = (directory.read_json(f / directory.MEASUREMENT)["modes"] for f in (folder, whole))
    assert next(measured) == next(measured)
    # The W&B run is two offline folders of one id now; together they hold every point once.
    segments = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(segments) == 2 and segments[0].name == segments[1].name
    tracked = [row for segment in segments for row in read_wandb_file(segment)]
    assert [row["trainer/global_step"] for row in tracked] == [p["step"] for p in points(folder)]
    assert [row["_step"] for row in tracked] == list(range(len(tracked))), "W&B's own step goes on"


def test_what_wandb_lost_to_a_kill_is_sent_again(fit):
    _, whole = fit(run_dir="whole")
    with killed_at(7):
        fit(run_dir="cut")
    folder = whole.parent / "cut"
    [segment] = folder.glob("wandb/offline-run-*/run-*.wandb")
    expected = len([p for p in points(folder) if p["step"] <= 4])
    deadline = time.monotonic() + 30  # W&B writes from a process of its own
    while len(list(read_wandb_file(segment))) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    # As after a kill: the last block never reached the disk.
    segment.write_bytes(segment.read_bytes()[: segment.stat().st_size // 2])
    kept = list(read_wandb_file(segment))
    assert 0 < len(kept) < expected, "points before the checkpoint are gone"
    assert fit("--ckpt_path", "last", run_dir="cut")[0] == 0
    segments = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    tracked = [row for segment in segments for row in read_wandb_file(segment)]
    assert [row["_step"] for row in tracked] == list(range(len(points(whole))))
    [reference] = whole.glob("wandb/offline-run-*/run-*.wandb")
    for ours, theirs in zip(tracked, read_wandb_file(reference), strict=True):
        assert ours.keys() ^ theirs.keys() <= {"train/tokens_per_second"}
        assert all(ours[k] == theirs[k] for k in ours if k.startswith(("sink/mass", "sink/rate", "train/loss", "val/")))
    images = [row["sink_maps/heads/bos/path"] for row in tracked if "sink_maps/heads/bos/path" in row]
    assert len(images) == 4 and all(list(folder.glob(f"wandb/*/files/{path}")) for path in images)


def test_a_finished_run_is_not_resumed_and_not_touched(fit, capsys):
    def files():  # but W&B's own logs, which its process may still be ending
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts}

    _, folder = fit()
    before = files()
    capsys.readouterr()
    assert fit("--ckpt_path", "last")[0] == 0
    assert "already finished, at step 10" in capsys.readouterr().out
    assert files() == before


def test_a_refused_run_leaves_no_folder(fit, capsys):
    status, folder = fit("--measure.sink_tokens", "64")
    assert status == 1 and not folder.exists()


def test_resuming_with_other_figures_is_refused(fit, capsys):
    with killed_at(7):
        fit()
    message = refused(capsys, fit("--ckpt_path", "last", "--measure.live_documents", "2")[0])
    assert "measure.live_documents: 3, got 2" in message
    status, folder = fit("--ckpt_path", "last", "--measure.live_points", "9")
    assert status == 0 and points(folder)[-1]["step"] == 10


def test_a_checkpoint_of_another_run_is_refused(fit, capsys):
    _, folder = fit()
    status, other = fit("--ckpt_path", str(folder / "checkpoints" / "step-0000004.ckpt"), run_dir="other")
    assert "expected last, auto or a checkpoint of this run" in refused(capsys, status)
    assert not other.exists()


def test_resuming_an_earlier_checkpoint_says_what_is_made_again(fit, capsys):
    _, folder = fit()
    before = points(folder)
    assert fit("--ckpt_path", str(folder / "checkpoints" / "step-0000003.ckpt"))[0] == 0
    later = sum(p["step"] > 3 for p in before)
    assert f"at step 3 of 10; {later} later points" in capsys.readouterr().out
    assert points(folder) == before
    (folder / directory.MEASUREMENT).unlink()
    assert fit("--ckpt_path", "last")[0] == 0
    assert "resuming" in (said := capsys.readouterr().out) and "later" not in said


def test_a_message_does_not_hang_on_the_bar(fit, capsys, monkeypatch):
    def fail(*_):
        raise ValueError("a fault")

    monkeypatch.setattr(SinkbedModule, "training_step", fail)
    fit("--trainer.enable_progress_bar", "true")
    said = capsys.readouterr()
    assert said.err.endswith("sinkbed fit: a fault\n") and "train:" in said.out and said.out.endswith("\n")


def test_a_run_killed_before_its_final_measurement_is_measured_on_resume(fit):
    _, folder = fit()
    expected, before = directory.read_json(folder / directory.MEASUREMENT), points(folder)
    (folder / directory.MEASUREMENT).unlink()
    assert fit("--ckpt_path", "last")[0] == 0
    again = directory.read_json(folder / directory.MEASUREMENT)
    assert again["modes"] == expected["modes"]
    assert again["seconds"]["training"] == pytest.approx(expected["seconds"]["training"], abs=1)
    assert points(folder) == before


def test_a_run_killed_before_wandb_has_everything_sends_the_rest_on_resume(fit, monkeypatch):
    from sinkbed.train.loop import trainer as trainer_module

    def killed(exit_code):
        raise Killed

    monkeypatch.setattr(trainer_module, "finish_wandb", killed)
    with pytest.raises(Killed):
        fit()
    monkeypatch.undo()
    trainer_module.finish_wandb(1)
    folder = fit.config.parent / "run"
    [segment] = folder.glob("wandb/offline-run-*/run-*.wandb")
    segment.write_bytes(segment.read_bytes()[: segment.stat().st_size // 2])
    before = directory.read_json(folder / directory.MEASUREMENT)["modes"]
    assert fit("--ckpt_path", "last")[0] == 0
    segments = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(segments) == 2
    steps = [row["_step"] for path in segments for row in read_wandb_file(path)]
    assert steps == list(range(len(points(folder))))
    assert directory.read_json(folder / directory.MEASUREMENT)["modes"] == before


def test_a_run_killed_before_its_first_checkpoint_starts_anew(fit):
    with killed_at(0):
        fit()
    _, folder = fit()
    assert [p["step"] for p in points(folder) if "train/loss" in p] == list(range(1, 11))


def test_a_used_run_directory_is_refused_and_left_alone(fit, capsys):
    _, folder = fit()
    before = (folder / directory.METRICS).read_bytes()
    message = refused(capsys, fit()[0])
    assert "got a run" in message and "--ckpt_path last" in message
    assert (folder / directory.METRICS).read_bytes() == before


def test_resuming_what_never_started_is_refused(fit, capsys):
    message = refused(capsys, fit("--ckpt_path", "last")[0])
    assert "got none" in message and "leave --ckpt_path out" in message


def test_resuming_another_strategy_is_refused_with_both_values_and_changes_nothing(fit, capsys):
    _, folder = fit()
    names = (directory.CONFIG, directory.AUDIT, directory.METRICS, directory.MEASUREMENT)
    before = [(folder / name).read_bytes() for name in names]
    message = refused(capsys, fit("--ckpt_path", "last", "--data.strategy.first_token", "none")[0])
    assert "data.strategy.first_token: the checkpoint has 'bos', this configuration 'none'" in message
    assert "decoder" not in message, "only what differs"
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model.optimizer.lr", "1e-3"),
        ("--trainer.max_steps", "20"),
        ("--data.batch_size", "8"),
        ("--data.seed", "5"),
    ],
)
def test_resuming_with_a_setting_the_checkpoint_would_override_is_refused(fit, capsys, option, value):
    fit()
    assert value.replace("1e-3", "0.001") in refused(capsys, fit("--ckpt_path", "last", option, value)[0])


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04" + b[2:]])
def test_a_damaged_checkpoint_is_named(fit, capsys, damage):
    _, folder = fit()
    last = folder / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(damage(content))
    message = refused(capsys, fit("--ckpt_path", "last")[0])
    assert str(last) in message and "does not load" in message


def test_a_checkpoint_cannot_run_code(fit, capsys, tmp_path):
    _, folder = fit()

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "trap"), "w")

    last = folder / "checkpoints" / "last.ckpt"
    last.unlink()
    torch.save({"state_dict": Trap()}, last)
    assert "does not load" in refused(capsys, fit("--ckpt_path", "last")[0])
    assert not (tmp_path / "trap").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(fit, capsys, monkeypatch):
    import sinkbed.model.decoder as decoder_module

    original = decoder_module.linear_cross_entropy
    calls = []

    def loss(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(decoder_module, "linear_cross_entropy", loss)
    status, folder = fit()
    message = refused(capsys, status)
    assert "step 7" in message and "nan" in message and "checkpoints before it are good" in message
    assert all(torch.isfinite(w).all() for w in weights(folder, 4).values())
    assert not (folder / "checkpoints" / "step-0000008.ckpt").exists()


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(directory.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError):
        write_json(path, {"new": 2})
    assert directory.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_wandb_holds_the_same_points_against_tokens(fit):
    _, folder = fit("--wandb.detail", "all")
    [binary] = folder.glob("wandb/offline-run-*/run-*.wandb")
    history = list(read_wandb_file(binary))
    ours = points(folder)
    assert len(history) == len(ours)
    for theirs, point in zip(history, ours, strict=True):
        for key, value in point.items():
            if isinstance(value, float | int) and key != "step":
                assert theirs[key] == pytest.approx(value), key
    images = [row["sink_maps/heads/bos/path"] for row in history if "sink_maps/heads/bos/path" in row]
    assert len(images) == 4 and all((binary.parent / "files" / path).exists() for path in images)


@pytest.mark.slow
def test_a_wandb_server_that_does_not_answer_costs_a_warning_only(fit):
    folder = fit.config.parent / "run"
    environment = {
        **{k: v for k, v in os.environ.items() if k != "WANDB_MODE"},
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nothing listens there
        "WANDB_API_KEY": "0" * 40,
    }
    command = [sys.executable, "-m", "sinkbed", "fit", "--config", str(fit.config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "goes on offline" in done.stderr and "wandb sync" in done.stderr
    assert len(points(folder)) > 10
    assert list(folder.glob("wandb/offline-run-*"))
    for path in folder.rglob("*"):
        assert not path.is_file() or b"0" * 40 not in path.read_bytes(), f"the key is in {path}"


@pytest.mark.slow
def test_tokens_per_second_leaves_measuring_out(fit, monkeypatch):
    from sinkbed.train.loop import module
    from sinkbed.train.loop.callbacks import sinks, states

    class Clock:
        """A tenth of a second at each look, so that the machine's own speed does not matter."""

        now = 0.0

        def perf_counter(self):
            self.now += 0.1
            return self.now

    original, clock = sinks.measure, Clock()

    def slow(*args):
        clock.now += 1_000
        return original(*args)

    monkeypatch.setattr(sinks, "measure", slow)
    for each in (module, sinks, states):
        monkeypatch.setattr(each, "time", clock)
    _, folder = fit()
    speeds = [
        p["train/tokens_per_second"]
        for p in directory.read_metrics(folder / directory.METRICS)
        if "train/tokens_per_second" in p
    ]
    # One step is 192 tokens, and takes a few looks at the clock.
    assert clock.now > 1_000 and len(speeds) == 9 and min(speeds) > 200, speeds


def test_validate_gives_the_numbers_of_the_final_measurement(fit, capsys, tmp_path):
    _, folder = fit()
    assert main(["validate", str(folder), "--json", str(tmp_path / "out.json")]) == 0
    assert (
        json.loads((tmp_path / "out.json").read_text()) == directory.read_json(folder / directory.MEASUREMENT)["modes"]
    )
    assert "BOS + text" in capsys.readouterr().out
    early = folder / "checkpoints" / "step-0000003.ckpt"
    assert main(["validate", str(early), "--modes", "as_trained", "random_first", "--documents", "2"]) == 0
    assert "step 3, 2 documents" in capsys.readouterr().out
    assert main(["validate", str(tmp_path)]) == 1
    assert "expected a run directory" in capsys.readouterr().err
