"""W&B as users meet it: wandb's own client and `wandb sync`, and a server on this machine that keeps what they send."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from sinkbed.train.run import directory
from sinkbed.train.run.charts import Charts
from sinkbed.train.run.wandb import Tracker
from sinkbed.train.run.wandb_files import wandb_records
from tests.support.processes import Job
from tests.support.runs import points
from tests.support.wandb_server import serving

pytestmark = pytest.mark.slow

LONG = ("--trainer.max_steps", "60", "--checkpoint_every", "10", "--checkpoint_points", "2", "--wandb.group", "study")


@pytest.fixture
def server():
    with serving() as found:
        yield found


@pytest.fixture
def start(fit):
    jobs = []

    def call(folder, *extra, environment):
        arguments = ["fit", "--config", str(fit.config), "--run_dir", str(folder), *LONG, *extra]
        jobs.append(Job(arguments, f"{folder}.log", [environment]))
        return jobs[-1]

    yield call
    for job in jobs:
        job.signal(signal.SIGKILL)
        job.finish()


OFFLINE = {"WANDB_MODE": "offline"}


def cut(start, folder, environments):
    """A run killed twice and ended, each time in another environment."""
    for turn, environment in enumerate(environments):
        job = start(folder, "--ckpt_path", "auto", environment=environment)
        deadline = time.monotonic() + 60
        while turn < 2 and (directory.newest_checkpoint(folder) is None or len(points(folder)) < 25 * (turn + 1)):
            assert job.alive() and time.monotonic() < deadline, job.output()
            time.sleep(0.01)
        if turn < 2:
            job.signal(signal.SIGKILL)
            assert job.finish() == [-signal.SIGKILL]
        else:
            assert job.finish() == [0], job.output()


def sync(server, segments):
    """`wandb sync` of a run's segments; what it says."""
    command = [str(Path(sys.executable).with_name("wandb")), "sync", "--no-skip-online", *map(str, sorted(segments))]
    environment = {**os.environ, **server.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("Finished syncing") == len(command) - 3, done.stderr


def holds(server, folder):
    """Assert that the server has one run, with every point of metrics.jsonl once and in order."""
    [run] = server.runs.values()
    assert run.name == directory.read_json(folder / directory.RUN)["wandb_id"]
    assert run.group == "study" and run.ended == 0 and run.changed == 0
    assert [row["_step"] for row in run.history] == list(range(len(points(folder))))
    for row, point in zip(run.history, points(folder), strict=True):
        assert row["trainer/global_step"] == point["step"] and row["train/tokens"] == point["train/tokens"]
        shared = [key for key, value in point.items() if isinstance(value, float) and key in row]
        assert shared and all(row[key] == pytest.approx(point[key]) for key in shared)
    assert any("sink_maps/heads/bos" in path for path in run.files), "images too"


def test_the_segments_of_a_killed_offline_run_sync_into_one_run(start, fit, server):
    folder = fit.config.parent / "run"
    cut(start, folder, [OFFLINE] * 3)
    sync(server, folder.glob("wandb/offline-run-*"))
    holds(server, folder)


def test_unfinished_segments_are_mended(start, fit, server):
    """A kill leaves a part of the last record, or none at all where nothing was flushed yet."""
    folder = fit.config.parent / "run"
    cut(start, folder, [OFFLINE] * 2)
    first, second = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    content = first.read_bytes()
    ends = [end for _, end in wandb_records(content)]
    cut_short = content[: (ends[-3] + ends[-2]) // 2]
    assert ends[-3] < len(cut_short) < ends[-2]
    first.write_bytes(cut_short)
    second.write_bytes(second.read_bytes()[:7])
    assert start(folder, "--ckpt_path", "auto", environment=OFFLINE).finish() == [0]
    assert first.read_bytes() == content[: ends[-3]] and not second.parent.exists()
    segments = sorted(folder.glob("wandb/offline-run-*"))
    assert len(segments) == 2
    sync(server, segments)
    holds(server, folder)


def test_a_run_killed_online_goes_on_as_the_same_run(start, fit, server):
    folder = fit.config.parent / "run"
    cut(start, folder, [server.environment] * 3)
    holds(server, folder)
    assert not list(folder.glob("wandb/offline-run-*"))


def test_a_run_begun_offline_is_uploaded_when_it_goes_on_with_a_key(start, fit, server):
    folder = fit.config.parent / "run"
    cut(start, folder, [OFFLINE, OFFLINE, server.environment])
    holds(server, folder)


@pytest.mark.parametrize("status", [401, 503])
def test_a_server_that_refuses_leaves_the_run_its_id(start, fit, server, status):
    folder = fit.config.parent / "run"
    cut(start, folder, [OFFLINE] * 2)
    identifier = directory.read_json(folder / directory.RUN)["wandb_id"]
    server.status = status
    job = start(folder, "--ckpt_path", "auto", environment=server.environment)
    assert job.finish() == [0], job.output()
    assert directory.read_json(folder / directory.RUN)["wandb_id"] == identifier
    assert "goes on offline. Upload it later with: wandb sync" in job.output()
    server.status = 200
    sync(server, folder.glob("wandb/offline-run-*"))
    holds(server, folder)


def test_a_slow_server_does_not_slow_training(start, fit, server):
    server.delay = 0.5
    folder = fit.config.parent / "run"
    job = start(folder, environment=server.environment)
    assert job.finish() == [0], job.output()
    holds(server, folder)
    seconds = directory.read_json(folder / directory.MEASUREMENT)["seconds"]["training"]
    assert seconds < server.delay * len(points(folder)) / 2, "no point waited for the server"


def test_a_server_lost_while_training_costs_nothing_but_the_upload(start, fit, server):
    folder = fit.config.parent / "run"
    job = start(folder, "--trainer.max_steps", "1000", "--wandb.finish_seconds", "2", environment=server.environment)
    deadline = time.monotonic() + 60
    while not (server.runs and len(points(folder)) > 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    server.silent = True
    assert job.finish() == [0], job.output()
    assert "step 1000, 6 documents" in job.output() and "Traceback" not in job.output()
    [run] = server.runs.values()
    assert len(run.history) < len(points(folder)) and run.ended is None
    assert f"upload it with: wandb sync --no-skip-online {folder}/wandb/*run-*" in job.output()
    server.silent = False
    sync(server, folder.glob("wandb/run-*"))
    holds(server, folder)


def test_a_fork_is_another_run_that_names_its_parent(start, fit, server):
    parent, fork = fit.config.parent / "parent", fit.config.parent / "fork"
    assert start(parent, environment=OFFLINE).finish() == [0]
    checkpoint = parent / "checkpoints" / "step-0000060.ckpt"
    job = start(fork, "--fork", str(checkpoint), "--trainer.max_steps", "70", environment=server.environment)
    assert job.finish() == [0], job.output()
    holds(server, fork)
    [run] = server.runs.values()
    known = directory.read_json(parent / directory.RUN)
    assert run.name != known["wandb_id"]
    expected = {"checkpoint": str(checkpoint), "step": 60, "wandb_id": known["wandb_id"]}
    assert json.loads(run.config)["parent"]["value"] == expected


def test_figures_for_a_process_that_is_gone_cost_a_warning(tmp_path, recwarn):
    """Regression: the run that had trained to its end failed."""
    experiment = MagicMock()
    experiment.summary.update.side_effect = ConnectionError("Connection lost")
    tracker = Tracker(experiment, tmp_path, Charts("layers"), sent=0, steps=(), number=0)
    for _ in range(2):
        tracker.summarize({"final/val/loss/text": 1.0})
    tracker.log_beside({"table": 1})
    tracker.log_point({"step": 1, "train/tokens": 8, "train/loss": 1.0})
    assert experiment.summary.update.call_count == 1 and not experiment.log.called
    assert [str(w.message) for w in recwarn if "W&B takes no more" in str(w.message)] != []
