"""A study on a real Ray cluster of two nodes on this machine; one of them is killed in the middle of an arm."""

import contextlib
import functools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.study.arms import LOG, ArmRun, plan
from sinkbed.train.study.file import load_study
from tests.support.runs import write_run_config

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ |= {"RAY_worker_niceness": "0"}  # 15 by default: arms would wait for the other tests


@pytest.fixture(scope="module")
def cluster():
    """A head and a second node, of one core and what Ray takes for a GPU each."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    found.second = found.add_node(num_cpus=1, num_gpus=1)
    yield found
    ray.shutdown()
    found.shutdown()


def write_study(tmp_path, store, steps, arms):
    """Arms long enough to be killed in, saving every ten steps."""
    write_run_config(tmp_path / "run.yaml", store)
    path = tmp_path / "study.yaml"
    path.write_text(
        f"title: On a cluster\nout: {tmp_path / 'out'}\n"
        f"base: [run.yaml, {{checkpoint_every: 10, trainer: {{max_steps: {steps}, log_every_n_steps: 10}}}}]\n"
        f"arms: {arms}\n"
    )
    return path


def process_of(run):
    """The process that trains an arm, by its command line."""
    commands = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/cmdline")}
    folder = str(run.folder).encode()
    return next(pid for pid, path in commands.items() if b"fit" in (c := path.read_bytes()) and folder in c)


def pause_each(runs, condition, then):
    """Pause each arm as soon as `condition` holds of it, so that none ends before all are there; call `then`, go on."""
    paused = {}
    end = time.monotonic() + 300
    while len(paused) < len(runs) and time.monotonic() < end:
        for run in (r for r in runs if r.arm not in paused and condition(r)):
            paused[run.arm] = process_of(run)
            os.kill(paused[run.arm], signal.SIGSTOP)
        time.sleep(0.02)
    then()
    for pid in paused.values():
        with contextlib.suppress(ProcessLookupError):  # died with its node
            os.kill(pid, signal.SIGCONT)


def points(folder):
    """The record of a run without its clock."""
    return [
        {k: v for k, v in point.items() if k != "train/tokens_per_second"}
        for point in directory.read_metrics(folder / directory.METRICS)
    ]


def test_a_cluster_without_what_an_arm_asks_for_is_refused(cluster, tiny_store, tmp_path, capsys):
    study = write_study(tmp_path, tiny_store, 10, "{one: []}")
    study.write_text(study.read_text() + "gpus: 2\n")
    assert main(["study", str(study), "--ray", cluster.address, "--quiet"]) == 1
    assert "expected a node with 1 CPUs and 2 GPUs for an arm, got 1 CPUs, 1 GPUs" in capsys.readouterr().err


def test_arms_go_on_from_their_checkpoints_when_the_study_is_stopped_and_when_a_node_is_killed(
    cluster, tiny_store, tmp_path
):
    arms = "{first: [], second: [{model: {optimizer: {lr: 5.0e-3}}}], broken: [{model: {optimizer: {lr: 1.0e+38}}}]}"
    study = write_study(tmp_path, tiny_store, 400, arms)
    study.write_text(study.read_text() + "gpus: 0.5\n")
    runs = {r.arm: r for r in plan(load_study(study))}
    both = [runs["first"], runs["second"]]

    def log(run):
        return path.read_text() if (path := run.folder / LOG).exists() else ""

    command = ["study", str(study), "--ray", cluster.address, "--quiet"]
    stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=pause_each, args=(both, ArmRun.resumable, stop))
    thread.start()
    assert main(command) == 130
    thread.join()
    assert [run.status() for run in both] == ["interrupted", "interrupted"]
    assert all("stopped at step" in log(run) for run in both), "they saved before they ended"

    killed = []

    def kill():
        killed.extend(run.status() for run in both)
        cluster.remove_node(cluster.second, allow_graceful=False)

    thread = threading.Thread(target=pause_each, args=(both, lambda run: "resuming" in log(run), kill))
    thread.start()
    assert main(command) == 1, "the broken arm failed"
    thread.join()
    assert killed == ["interrupted", "interrupted"], "both were running when the node was killed"
    assert {name: r.status() for name, r in runs.items()} == {
        "first": "finished", "second": "finished", "broken": "failed"
    }  # fmt: skip
    resumed = {run.arm: log(run).count("resuming") for run in both}
    assert sorted(resumed.values()) == [1, 2], "that of the killed node once more, that of the other node not"
    assert "expected finite" in runs["broken"].reason(), "and it was tried once, then reported"
    assert (runs["broken"].folder / LOG).read_text().count("expected finite") == 1

    lost = max(resumed, key=resumed.__getitem__)
    lr = [] if lost == "first" else ["--model.optimizer.lr", "5.0e-3"]
    steps = ["--checkpoint_every", "10", "--trainer.max_steps", "400", "--trainer.log_every_n_steps", "10"]
    whole = ["fit", "--config", str(tmp_path / "run.yaml"), "--run_dir", str(tmp_path / "whole"), *steps, *lr]
    assert main(whole) == 0
    assert points(runs[lost].folder) == points(tmp_path / "whole"), "as if its node had lived"
