"""`sinkbed fit` in processes of its own, one or several that belong together, forked from one that has imported all."""

import multiprocessing
import os
import resource
import signal
import socket
import sys

from sinkbed.train.study.processes import PRELOAD

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([*PRELOAD, "sinkbed.train.cli.main", __name__])


def _run(arguments, log, environment, largest_file, group):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a program to interrupt
    if group:
        os.setpgid(0, 0)
    os.environ.pop("WANDB_SERVICE", None)  # of the process that runs the tests
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    from lightning.pytorch.utilities import rank_zero_only

    from sinkbed.train.cli.main import main

    if "SINKBED_TEST_LOSS" in environment:
        from sinkbed.train.loop.callbacks.sinks import SinkMonitor

        # Of one process it falls, of the other it rises.
        sign = 1 - 2 * int(environment["SINKBED_TEST_LOSS"])
        SinkMonitor.loss_at = lambda self, step: 10 - sign * step

    rank_zero_only.rank = int(environment.get("RANK", environment.get("SLURM_PROCID", 0)))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(main(arguments))


class Job:
    """One run: its processes, what they print, how they end."""

    def __init__(self, arguments, log, environments=({},), largest_file=None, group=False):
        """`group`: each process leads a process group of its own; `largest_file`: bytes, as if the disk were full."""
        self.log = log
        self.processes = [
            FORKSERVER.Process(target=_run, args=(arguments, log, environment, largest_file, group))
            for environment in environments
        ]
        for process in self.processes:
            process.start()

    @property
    def first(self):
        return self.processes[0]

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def signal(self, number):
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def finish(self, timeout=120):
        """Exit statuses, a negative signal number where one ended a process; an assertion fails on a hang."""
        for process in self.processes:
            process.join(timeout=timeout)
        assert not self.alive(), f"hangs: {self.output()[-2000:]}"
        return [process.exitcode for process in self.processes]

    def output(self):
        with open(self.log) as file:
            return file.read()


def torchrun(processes):
    """The variables that torchrun sets for each process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def slurm(processes):
    """The variables that srun sets for each task."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": str(processes), "SLURM_JOB_NAME": "sinkbed", "SLURM_NODEID": "0",
              "SLURM_NODELIST": "localhost", "SLURM_STEP_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "SLURM_NTASKS_PER_NODE": str(processes)}  # fmt: skip
    return [{**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(processes)]
