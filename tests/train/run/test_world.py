"""Who writes a run is decided by the processes that it has, not by what is left in the environment; and none of them
outlives what started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.run.world import is_set_by_a_launcher, join, leave, lost_process
from sinkbed.train.study.arms import environment
from tests.support import ROOT
from tests.support.runs import points, refused

LEFT_OVER = [
    {"RANK": "3"},
    {"LOCAL_RANK": "1"},
    {"SLURM_PROCID": "5", "SLURM_LOCALID": "5"},
    {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"},  # srun --pty bash
    {"RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "1", "GROUP_RANK": "1"},
    {"JSM_NAMESPACE_RANK": "2", "OMPI_COMM_WORLD_RANK": "2", "PMI_RANK": "2"},
]
OTHERS = [
    ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2"),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}, "SLURM_NTASKS=8"),
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4"),
]


@pytest.fixture
def launched(monkeypatch):
    """Set a launcher's variables and Lightning's idea of them, as it reads them when it is imported."""
    from lightning.pytorch.utilities import rank_zero_only

    before = dict(os.environ)
    monkeypatch.setattr(rank_zero_only, "rank", 0)

    def call(variables):
        os.environ.update(variables)
        rank_zero_only.rank = next((int(v) for k, v in variables.items() if k.endswith(("RANK", "PROCID"))), 0)

    yield call
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("variables", LEFT_OVER, ids=lambda v: "+".join(v))
def test_a_process_that_is_alone_is_the_first_whatever_is_left_in_its_environment(launched, variables):
    from lightning.pytorch.utilities import rank_zero_only

    launched(variables)
    assert rank_zero_only.rank != 0
    assert join(1, 1) == 0 and rank_zero_only.rank == 0
    assert not any(map(is_set_by_a_launcher, set(os.environ) - {"SINKBED_LAUNCHER"}))


@pytest.mark.parametrize("variables", [LEFT_OVER[0], LEFT_OVER[3]], ids=lambda v: "+".join(v))
def test_it_writes_its_run_and_locks_it(fit, launched, variables, capsys):
    launched(variables)
    status, folder = fit()
    assert status == 0 and len(points(folder)) > 10 and list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    held = subprocess.Popen(
        [sys.executable, "-c", f"from sinkbed.train.run import directory; from pathlib import Path; "
         f"held = directory.lock(Path({str(folder)!r})); print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert held.stdout.readline() == b"held\n"
    launched(variables)
    assert "a process that still does" in refused(capsys, fit("--ckpt_path", "last")[0])
    held.communicate(b"\n")


@pytest.mark.parametrize(("variables", "named"), OTHERS, ids=[named for _, named in OTHERS])
def test_another_number_of_processes_than_the_trainer_asks_for_is_refused(fit, launched, capsys, variables, named):
    launched(variables)
    status, folder = fit()
    message = refused(capsys, status)
    assert f"expected {named}" in message and "got 1;" in message and "env -u" in message
    assert not folder.exists()


def test_the_ranks_of_a_launcher_are_those_of_the_run(launched):
    launched({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"})
    assert join(2, 2) == 3 and os.environ["RANK"] == "3"
    del os.environ["RANK"]  # Lightning's own launcher, on one machine
    assert join(4, 1) == 1
    os.environ["WORLD_SIZE"] = "four"
    with pytest.raises(ValueError, match="WORLD_SIZE: expected a whole number, got 'four'"):
        join(4, 1)
    leave(os.environ)
    os.environ |= {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}  # srun -n 2
    assert join(2, 1) == 1 and os.environ["SLURM_NTASKS_PER_NODE"] == "2"


def test_an_arm_has_no_part_in_the_launch_of_its_study(launched):
    launched({**LEFT_OVER[0], **LEFT_OVER[2], "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "1"})
    assert not any(map(is_set_by_a_launcher, environment()))
    assert environment()["PATH"] == os.environ["PATH"] and environment()["PYTHONSAFEPATH"] == "1"
    launched({"RANK": "3"})
    assert main(["validate", "nowhere"]) == 1 and "RANK" not in os.environ, "every other command is one process"


def test_files_of_the_working_directory_are_not_imported(tmp_path):
    for name in ("numpy.py", "yaml.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-m", "sinkbed", "prepare", "--source.fils", "x"]
    plain = {**environment(), "PYTHONSAFEPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert "did you mean source.files" in done.stderr and not (tmp_path / "ran").exists(), done.stderr


def marked(mark):
    """Processes, not yet reaped ones aside, that were started with a mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes() and " Z " not in (process / "stat").read_text():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


START = """
import sys, threading
from pathlib import Path
from sinkbed.train.study.processes import FitProcess, warm_up
if sys.argv[1] == "forked":
    warm_up()
FitProcess(sys.argv[3:], Path(sys.argv[2]), {}, fork=sys.argv[1] == "forked").wait()
"""


@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [
        # The study, the process forked from, its resource tracker, the arm, its two data workers, W&B's.
        ("forked", ["--data.workers", "2"], 6),
        ("started", ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.workers", "1"], 5),
    ],
)
@pytest.mark.slow
def test_nothing_outlives_a_study_that_is_killed(fit, tmp_path, kind, options, least):
    """Not the arm, not its data workers, not W&B's process, not the second process of an arm on two devices."""
    mark = f"SINKBED_TEST={tmp_path}"
    arguments = ["fit", "--config", str(fit.config), "--run_dir", str(tmp_path / "run"), *options,
                 "--trainer.max_steps", "100000"]  # fmt: skip
    command = [sys.executable, "-c", START, kind, str(tmp_path / "fit.log"), *arguments]
    study = subprocess.Popen(command, cwd=ROOT, env={**environment(), "SINKBED_TEST": str(tmp_path)})
    deadline = time.monotonic() + 90
    while directory.newest_checkpoint(tmp_path / "run") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    before = marked(mark.encode())
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    assert len(before) >= least, before
    deadline = time.monotonic() + 10
    while (left := marked(mark.encode())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_a_process_that_lightning_starts_on_another_node_has_a_rank_of_its_own(launched):
    launched({"WORLD_SIZE": "8", "NODE_RANK": "1", "LOCAL_RANK": "3"})
    assert join(4, 2) == 7


def test_a_reader_that_is_gone_is_no_lost_worker():
    assert lost_process(BrokenPipeError(32, "Broken pipe"), lambda: None) is None
    reset = ConnectionResetError(104, "reset")
    assert lost_process(reset, lambda: None) is None, "of W&B's process, or of a file that is read"
    try:
        exec(compile("raise reset", "site-packages/torch/utils/data/dataloader.py", "exec"), {"reset": reset})
    except ConnectionResetError:
        assert "data worker" in str(lost_process(reset, lambda: None))
    told = ValueError("damaged")
    told.__context__, told.__suppress_context__ = reset, True
    assert lost_process(told, lambda: None) is None, "`raise … from None`"
