"""The runner of a Ray cluster: an arm is a task that goes on from its checkpoint when its node is lost.

The nodes share a file system, on which the study's folder, the token store and this checkout have the same paths.
A task starts `sinkbed fit` as a process that ends with it, waits, and returns why it failed; so a setting that is
wrong fails once, and Ray repeats only what died with its worker or node. The repeated task finds the checkpoint.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from sinkbed.train.run.world import end_with_parent
from sinkbed.train.study.arms import LOG, ArmRun, begin, conclude, environment
from sinkbed.train.study.file import StudyConfig
from sinkbed.train.study.local import watch

_SECONDS_FOR_THE_DEAD = 120.0
"""Longest wait for a process of a node that Ray gave up: it may live a little longer."""


def run_arm(run: ArmRun, group: str, folder: str) -> str:
    """On a worker: start or resume an arm and wait for it; why it failed, or nothing."""
    os.chdir(folder)
    # Ray cancels by an interrupt, which goes unseen where a shell in the background has it ignored, or in a long wait.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = begin(run, group, _SECONDS_FOR_THE_DEAD)
    if arguments is None:
        return ""
    with (run.folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sinkbed", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
            preexec_fn=functools.partial(end_with_parent, os.getpid()),  # Ray kills workers
        )
        try:
            while (status := process.poll()) is None:
                time.sleep(0.2)
        except BaseException:  # cancelled: the arm saves and stops, and is no failure
            process.terminate()
            process.wait()
            raise
    return conclude(run, status)


class RayRunner:
    """Runs arms on a Ray cluster. Raises ValueError where Ray is not installed or no node has what an arm asks for."""

    def __init__(self, study: StudyConfig, runs: Sequence[ArmRun], address: str, retries: int) -> None:
        """Connect.

        Args:
            address: of the cluster, `auto` for the one this machine is part of, `local` for one of its own.
            retries: times that Ray starts an arm again whose worker or node was lost.
        """
        try:
            import ray
        except ImportError:
            raise ValueError("--ray: expected the package ray, got none; pip install -e '.[ray]'") from None
        self.ray: Any = ray
        self.study = study
        self.runs = runs
        self.retries = retries
        self.failed: dict[str, str] = {}
        variables = {name: value for name, value in environment().items() if os.environ.get(name) != value}
        if not ray.is_initialized():
            try:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    runtime_env={"env_vars": variables},
                )
            except ConnectionError as error:
                raise ValueError(f"--ray {address}: expected a Ray cluster, got none ({error})") from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= study.cpus and n.get("GPU", 0) >= study.gpus for n in nodes):
            raise ValueError(
                f"--ray {address}: expected a node with {study.cpus} CPUs and {study.gpus:g} GPUs for an arm, got "
                + ("; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes) or "no node")
            )

    def overhead(self) -> None:
        """Not known: it is the cluster's scheduling too."""

    def run(self, progress: bool) -> None:
        """Run what is not finished. Interrupting stops the arms; they resume next time."""
        todo = [r for r in self.runs if r.status() != "finished"]
        task = self.ray.remote(run_arm).options(
            num_cpus=self.study.cpus, num_gpus=self.study.gpus, max_retries=self.retries, retry_exceptions=False
        )
        # A study's paths are relative to the folder it was called from.
        tasks = {task.remote(run, self.study.name, os.getcwd()): run for run in todo}
        pending = list(tasks)

        def done() -> int:
            nonlocal pending
            ended, pending = self.ray.wait(pending, num_returns=len(pending), timeout=0.5) if pending else ([], [])
            for each in ended:
                self._collect(each, tasks[each])
            return len(todo) - len(pending)

        try:
            watch(self.runs, len(self.runs) - len(todo), done, progress)
        except BaseException:
            for each in pending:
                self.ray.cancel(each)
            self.ray.wait(pending, num_returns=len(pending), timeout=60)
            raise

    def _collect(self, task: Any, run: ArmRun) -> None:
        """What became of a task that has ended."""
        try:
            failed = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            failed = f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
        if failed:
            self.failed[run.folder.name] = failed
