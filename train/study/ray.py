"""The runner of a Ray cluster: an arm is a task that goes on from its checkpoint when its node is lost.

The nodes share a file system, on which the study's folder, the token store and this checkout have the same paths.
A task starts `sinkbed fit` as a process that ends with it, waits, and returns why it failed; so a setting that is
wrong fails once, and Ray repeats only what died with its worker or node. The repeated task finds the checkpoint.
"""

import logging
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from sinkbed.train.study.arms import LOG, ArmRun, begin, conclude, environment
from sinkbed.train.study.file import StudyConfig
from sinkbed.train.study.local import Runner
from sinkbed.train.study.processes import FitProcess

_SECONDS_FOR_THE_DEAD = 120.0
"""Longest wait for a process of a node that Ray gave up: it may live a little longer."""


def run_arm(run: ArmRun, group: str, folder: str) -> str:
    """On a worker: start or resume an arm and wait for it; why it failed, or nothing."""
    os.chdir(folder)
    # Ray cancels by an interrupt, which goes unseen where a shell in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = begin(run, group, _SECONDS_FOR_THE_DEAD)
    if arguments is None:
        return ""
    process = FitProcess(arguments, run.folder / LOG, {}, fork=False)  # ends with its worker, which Ray may kill
    try:
        return conclude(run, process.wait())
    except BaseException:  # cancelled: the arm saves and stops, and is no failure
        process.terminate()
        process.wait()
        raise


class RayRunner(Runner):
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
        super().__init__(study, runs)
        self.ray: Any = ray
        self.retries = retries
        self.tasks: list[Any] = []
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

    def start(self, runs: Sequence[ArmRun]) -> list[Future[str]]:
        """A task each, which Ray places."""
        task = self.ray.remote(run_arm).options(
            num_cpus=self.study.cpus, num_gpus=self.study.gpus, max_retries=self.retries, retry_exceptions=False
        )
        # A study's paths are relative to the folder it was called from.
        self.tasks = [task.remote(run, self.study.name, os.getcwd()) for run in runs]
        return [each.future() for each in self.tasks]

    def stop(self) -> None:
        """Cancel the tasks, and wait for them."""
        for each in self.tasks:
            self.ray.cancel(each)
        self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=60)
