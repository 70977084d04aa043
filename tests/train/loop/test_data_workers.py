"""A data worker that dies, fails, or reads a damaged store ends the run with one message."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sinkbed.train.run import directory
from tests.support.processes import Job
from tests.support.runs import refused


def is_alive(process):
    """Whether it runs: one that has ended may wait for its parent to ask."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_dead_data_worker_ends_the_run_with_one_message(fit, tmp_path):
    arguments = ["fit", "--config", str(fit.config), "--data.workers", "3", "--trainer.max_steps", "100000"]
    job = Job([*arguments, "--wandb.mode", "disabled"], str(tmp_path / "log"))
    deadline = time.monotonic() + 60
    while not (directory.newest_checkpoint(tmp_path / "run") and len(children(job.first.pid)) == 3):
        assert time.monotonic() < deadline and job.alive(), job.output()
        time.sleep(0.01)
    workers = children(job.first.pid)
    os.kill(workers[1], signal.SIGKILL)
    assert job.finish(timeout=10) == [1]
    assert "a data worker of this run ended" in job.output() and "resume the run" in job.output()
    assert "Traceback" not in job.output() and job.output().count("sinkbed fit:") == 1
    deadline = time.monotonic() + 10
    while (left := [pid for pid in workers if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


HANGS_UP = """
import os, socket, time
from multiprocessing import resource_sharer
from sinkbed.train.loop.datamodule import _begin_worker

_begin_worker(0)
address, _ = resource_sharer.DupFd(os.dup(1))._id  # what a batch in shared memory is handed over as
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    connection.recv(1)
time.sleep(0.5)
"""


def test_a_run_that_ends_while_it_takes_a_batch_leaves_no_traceback_of_a_worker():
    ended = subprocess.run([sys.executable, "-c", HANGS_UP], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_data_worker_that_dies_while_its_batch_is_taken_is_told_of_as_such(fit, monkeypatch, capsys, error):
    """Tensors come through a socket of the worker."""

    def dead(self, *args):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", dead)
    assert "a data worker of this run ended" in refused(capsys, fit("--data.workers", "1")[0])


def test_a_data_worker_that_dies_while_a_checkpoint_is_written_is_told_of_as_such(fit, monkeypatch, capsys):
    """torch raises it in the midst of whatever goes on; its writer of archives makes an error of its own of it."""
    original = torch.save

    def interrupted(checkpoint, file):
        if checkpoint["global_step"] < 4:
            return original(checkpoint, file)
        try:
            raise RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")
        except RuntimeError:
            raise SystemError("unexpected position in the archive")  # noqa: B904

    monkeypatch.setattr(torch, "save", interrupted)
    status, folder = fit()
    message = refused(capsys, status)
    assert "a data worker of this run ended (DataLoader worker (pid 77) is killed by signal: Killed)" in message
    assert "step-0000003.ckpt is saved" in message and not list((folder / "checkpoints").glob(".step-*"))


def test_an_error_in_a_data_worker_is_one_message(fit, monkeypatch, capsys):
    from sinkbed.data.pack.batches import Rows

    original = Rows.__getitems__

    def damaged(self, numbers):
        if self.store.split == "train" and torch.utils.data.get_worker_info() is not None and max(numbers) > 20:
            raise ValueError("train/00000.arrow: expected rows, got none;\nprepare it again")
        return original(self, numbers)

    monkeypatch.setattr(Rows, "__getitems__", damaged)
    began = time.monotonic()
    status, _ = fit("--data.workers", "2")
    message = refused(capsys, status)
    assert "sinkbed fit: train/00000.arrow: expected rows, got none;\nprepare it again" in message
    assert "Traceback" not in message and time.monotonic() - began < 30


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_shard_that_becomes_shorter_under_a_run_is_one_message(fit, tiny_store, tmp_path, workers):
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    arguments = ["fit", "--config", str(fit.config), "--data.store", str(store), "--trainer.max_steps", "100000"]
    job = Job([*arguments, "--data.workers", workers, "--wandb.mode", "disabled"], str(tmp_path / "log"))
    deadline = time.monotonic() + 60
    # Long after the store was compared with its checksums, which would find it first.
    while (newest := directory.newest_checkpoint(tmp_path / "run")) is None or int(newest.stem[5:]) < 200:
        assert time.monotonic() < deadline and job.alive(), job.output()
        time.sleep(0.01)
    for shard in store.glob("train/*.arrow"):
        os.truncate(shard, 0)
    assert job.finish(timeout=20) == [1]
    assert "train/00000.arrow is damaged: expected " in job.output()
    assert "Traceback" not in job.output() and job.output().count("sinkbed fit:") == 1
