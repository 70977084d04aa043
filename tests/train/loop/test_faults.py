"""Runs that are killed, starved and damaged, as they are in real life: in processes of their own.

The long form is `pytest tests/train/loop/test_faults.py --kills 200`.
"""

import itertools
import os
import random
import signal
import time
import zipfile

import pytest

from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import load_checkpoint
from sinkbed.train.run.wandb_files import read_wandb_file
from tests.support.processes import Job, slurm
from tests.support.runs import equal, killed_at, points, training_state

LONG = (
    "--trainer.max_steps",
    "40",
    "--checkpoint_every",
    "3",
    "--checkpoint_points",
    "5",
    "--measure.live_points",
    "6",
)


@pytest.fixture
def start(fit):
    """Start `sinkbed fit` in a process of its own."""
    jobs = []

    def call(folder, *extra, environment=None, **options):
        arguments = ["fit", "--config", str(fit.config), "--run_dir", str(folder), *extra]
        jobs.append(Job(arguments, f"{folder}.log", [environment or {}], **options))
        return jobs[-1]

    yield call
    for job in jobs:
        job.signal(signal.SIGKILL)
        job.finish()


@pytest.fixture
def folder(fit):
    return fit.config.parent / "cut"


def wait_for_partial(folder, job, deadline):
    """Wait until a checkpoint is being written."""
    while job.alive() and time.monotonic() < deadline:
        if any((folder / "checkpoints").glob(".step-*")):
            return True
    return False


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_the_uninterrupted_run(fit, start, request):
    """SIGKILL at any moment, while a checkpoint is being written, and now and then a polite signal."""
    kills, draw = request.config.getoption("--kills"), random.Random(0)
    whole = fit.config.parent / "whole"
    start(whole, "--help").finish()  # the first one waits for the imports
    began = time.monotonic()
    assert start(whole, *LONG).finish() == [0]
    lasts = time.monotonic() - began
    done = in_writing = 0
    for trial in itertools.count():
        folder = fit.config.parent / f"cut{trial}"
        for _ in range(draw.randint(2, 8)):
            job = start(folder, *LONG, "--ckpt_path", "auto")
            number = draw.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
            if in_writing == 0 or draw.random() < 0.3:
                number = signal.SIGKILL
                in_writing += wait_for_partial(folder, job, time.monotonic() + lasts)
            else:
                job.first.join(timeout=draw.uniform(0, 1.1) * lasts)
            done += job.alive()
            job.signal(number)
            assert job.finish()[0] in (0, -signal.SIGKILL, -number, 128 + number), job.output()
        job = start(folder, *LONG, "--ckpt_path", "auto")
        assert job.finish() == [0], job.output()
        assert points(folder) == points(whole), f"trial {trial} of {done} kills"
        assert equal(training_state(folder, 40), training_state(whole, 40)), f"trial {trial}"
        names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (folder, whole)]
        assert set(names[1]) <= set(names[0]) and not any(name.startswith(".") for name in names[0])
        segments = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        steps = [row["_step"] for segment in segments for row in read_wandb_file(segment)]
        assert steps == list(range(len(points(whole)))), "W&B has every point once"
        assert "Traceback" not in job.output(), job.output()
        if done >= kills:
            break
    print(f"{done} kills, {in_writing} of them while a checkpoint was being written, over {trial + 1} runs")


def test_a_run_killed_with_sigkill_resumes_to_the_same_weights(fit, start, folder):
    _, whole = fit(run_dir="whole")
    job = start(folder)
    while not (folder / "checkpoints" / "last.ckpt").exists() and job.alive():
        time.sleep(0.002)
    job.signal(signal.SIGKILL)
    assert job.finish() == [-9]
    (folder / "checkpoints" / ".step-0000008.ckpt.partial").write_bytes(b"half")
    assert fit("--ckpt_path", "last", run_dir="cut")[0] == 0
    assert points(folder) == points(whole)
    assert equal(training_state(folder, 10), training_state(whole, 10))
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_told_to_stop_saves_first(start, folder, number, status):
    # So long that it cannot end before the signal comes, with no other checkpoint in between.
    job = start(folder, "--trainer.max_steps", "2000", "--checkpoint_every", "2000")
    deadline = time.monotonic() + 120
    while len(list(directory.read_metrics(folder / directory.METRICS))) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="nobody writes to"):
        directory.lock(folder)
    job.signal(number)
    assert job.finish() == [status], job.output()
    assert directory.read_json(folder / directory.RUN)["sessions"][-1]["status"] == status
    step = max(int(saved.stem.removeprefix("step-")) for saved in (folder / "checkpoints").glob("step-*.ckpt"))
    assert f"stopped at step {step}; step {step} is saved" in job.output()
    assert not (folder / directory.MEASUREMENT).exists()
    assert points(folder)[-1]["step"] == step
    directory.lock(folder).close()  # free again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_every_process_of_the_run_saves_first(start, folder, number):
    """As a scheduler sends it, and a launcher once more; data workers live until the checkpoint is saved."""
    job = start(folder, "--trainer.max_steps", "5000", "--checkpoint_every", "5000", "--data.workers", "2", group=True)
    deadline = time.monotonic() + 60
    while directory.newest_checkpoint(folder) is None and time.monotonic() < deadline and job.alive():
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(job.first.pid, number)
    assert job.finish() == [128 + number], job.output()
    step = int(directory.newest_checkpoint(folder).stem[5:])
    assert f"step {step} is saved" in job.output() and "Traceback" not in job.output()
    assert points(folder)[-1]["step"] == step


def test_a_full_disk_is_one_message_and_leaves_no_part_of_a_checkpoint(start, folder):
    settings = ("--wandb.mode", "disabled", "--trainer.max_steps", "4")
    assert start(folder, *settings).finish() == [0]
    size = (folder / "checkpoints" / "step-0000004.ckpt").stat().st_size
    full = folder.with_name("full")
    job = start(full, *settings, largest_file=size - 500)
    assert job.finish() == [1]
    message = job.output()
    assert "Traceback" not in message and "disk is full while writing" in message and ".ckpt" in message
    assert not list((full / "checkpoints").glob(".step*"))
    for path in (full / "checkpoints").glob("step-*.ckpt"):
        load_checkpoint(path)
    job = start(full, *settings, "--ckpt_path", "auto")
    assert job.finish() == [0], job.output()


def test_sigusr1_under_slurm_saves_and_requeues(start, folder, tmp_path):
    """A stand-in for scontrol records what it is called with."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    scontrol.chmod(0o755)
    [environment] = slurm(1)
    environment["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    command = (folder, "--trainer.max_steps", "3000", "--ckpt_path", "auto")
    job = start(*command, environment=environment)
    deadline = time.monotonic() + 60
    while directory.newest_checkpoint(folder) is None and time.monotonic() < deadline and job.alive():
        time.sleep(0.01)
    job.signal(signal.SIGUSR1)
    assert job.finish() == [128 + signal.SIGUSR1], job.output()
    assert (tmp_path / "calls").read_text() == "requeue 77\n"
    step = int(directory.newest_checkpoint(folder).stem[5:])
    assert f"step {step} is saved" in job.output() and "queued again" in job.output()
    # The script of the requeued job has the same command.
    again = start(*command, environment=environment)
    resumes = f"resuming {folder} at step {step}"
    while resumes not in again.output() and time.monotonic() < deadline and again.alive():
        time.sleep(0.01)
    assert resumes in again.output()


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_a_damaged_checkpoint_never_loads_as_another(fit, kind):
    _, folder = fit()
    path = folder / "checkpoints" / "step-0000010.ckpt"
    good, content, draw = load_checkpoint(path), path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(60):
        at = draw.randrange(len(content))
        bad = content[:at] + (
            bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :] if kind == "flipped" else b""
        )
        path.write_bytes(bad)
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "--ckpt_path" in str(error) and "step-0000003.ckpt" in str(error)
        else:
            assert kind == "flipped" and equal(found, good), "a byte without meaning, such as padding"
    assert refused > (30 if kind == "flipped" else 59)


def test_an_entry_that_is_made_a_folder_is_damage(fit):
    """Its content is under a checksum, what kind of entry it is under none; torch then gave back unwritten memory."""
    _, folder = fit()
    path = folder / "checkpoints" / "step-0000010.ckpt"
    with zipfile.ZipFile(path) as archive:
        start, entries = archive.start_dir, [name for name in archive.namelist() if "/data/" in name]
    good = path.read_bytes()
    for entry in entries:
        at = good.index(entry.encode(), start) - 46 + 38  # of the external attributes in a directory entry
        path.write_bytes(good[:at] + bytes([good[at] | 0x10]) + good[at + 1 :])
        with pytest.raises(ValueError, match="checksum of data/"):
            load_checkpoint(path)


def test_following_the_message_about_a_damaged_checkpoint_loses_no_more_than_it_must(fit, capsys):
    _, whole = fit(run_dir="whole")
    with killed_at(9):
        fit(run_dir="cut")
    cut = whole.parent / "cut"
    newest = cut / "checkpoints" / "step-0000008.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert fit("--ckpt_path", "auto", run_dir="cut")[0] == 1
    message = capsys.readouterr().err
    assert str(newest) in message and "checksum of" in message
    earlier = message.rpartition("--ckpt_path ")[2].strip()
    assert earlier != str(newest) and earlier.startswith(str(cut / "checkpoints"))
    assert fit("--ckpt_path", earlier, run_dir="cut")[0] == 0
    assert points(cut) == points(whole) and equal(training_state(cut, 10), training_state(whole, 10))


def test_damage_found_while_training_stops_the_run(fit, capsys, monkeypatch):
    """A store that takes longer to compare than a second is compared while training goes on."""
    from sinkbed.train.loop.callbacks.store_check import StoreCheck

    monkeypatch.setattr(StoreCheck, "_compare", lambda self: None)
    original = StoreCheck.on_train_batch_end

    def later(self, trainer, *args):
        if trainer.global_step == 6:
            self.damage = ValueError("train-00000.arrow: damaged")
        original(self, trainer, *args)

    monkeypatch.setattr(StoreCheck, "on_train_batch_end", later)
    status, folder = fit()
    assert status == 1
    assert "train-00000.arrow: damaged. Steps since" in capsys.readouterr().err
    assert directory.newest_checkpoint(folder).name == "step-0000004.ckpt"


def test_a_damaged_token_store_stops_the_run_before_its_first_step(fit, tiny_store, tmp_path, capsys):
    import shutil

    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    shard = next(store.glob("train*.arrow"), None) or max(store.rglob("*.arrow"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, folder = fit("--data.store", str(store))
    assert status == 1
    assert shard.name in (message := capsys.readouterr().err) and "damaged" in message
    assert directory.newest_checkpoint(folder) is None


def test_a_tracker_that_never_answers_costs_seconds_and_not_the_run(fit, monkeypatch):
    """A server that takes connections and says nothing."""
    import socket

    from sinkbed.train.run import wandb as wandb_module

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setattr(wandb_module, "_SECONDS_TO_ANSWER", 0.5)
        import wandb

        wandb.teardown()
        with pytest.warns(UserWarning, match="does not answer; the run goes on offline"):
            status, folder = fit("--wandb.mode", "online")
        monkeypatch.undo()
        wandb.teardown()
    assert status == 0
    [segment] = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert len(list(read_wandb_file(segment))) == len(points(folder))


def test_no_key_is_written_anywhere(fit, monkeypatch):
    secret = "5" * 17 + "ab" * 11 + "7"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("HF_TOKEN", f"hf_{secret}")
    status, folder = fit("--wandb.mode", "offline")
    assert status == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_config_that_builds_objects_is_refused(fit, capsys, tmp_path):
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert fit("--config", str(evil))[0] == 1
    message = capsys.readouterr().err
    assert "evil.yaml, line 1: expected YAML of plain values" in message and "python/object/apply:os.mkdir" in message
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_link_that_leaves_the_run_is_refused(fit, capsys, tmp_path):
    _, folder = fit()
    outside = tmp_path / "outside.ckpt"
    (folder / "checkpoints" / "step-0000010.ckpt").rename(outside)
    (folder / "checkpoints" / "step-0000010.ckpt").symlink_to(outside)
    assert fit("--ckpt_path", "last")[0] == 1
    assert "expected last, auto or a checkpoint of this run" in capsys.readouterr().err
