"""Processes for arms: forked from one that has imported everything, so that an arm starts in a moment.

Importing torch, Lightning and W&B takes longer than the first hundred steps of a small arm, and is done once. An arm
on a GPU or of several devices is started by a command of its own instead. None outlives the process that started it.
"""

import functools
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from sinkbed.train.run.world import end_with_parent
from sinkbed.train.study.arms import environment

_context = multiprocessing.get_context("forkserver")
# Starting a process and asking after one both collect any that have ended; of two threads that read the same
# status, one would get none.
_lock = threading.Lock()


PRELOAD = ("sinkbed.train.loop.trainer", "wandb", "wandb.sdk.launch.inputs.internal", "pandas")
"""What an arm imports; W&B imports the last two once it starts."""


def warm_up() -> None:
    """Start the process that the others are forked from; it imports while the caller goes on."""
    _context.set_forkserver_preload(list(PRELOAD))
    before = dict(os.environ)
    _become(environment())
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        _become(before)


def _become(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class FitProcess:
    """`sinkbed` with some arguments in a process of its own, its output appended to a file."""

    def __init__(self, arguments: Sequence[str], log: Path, variables: dict[str, str], *, fork: bool) -> None:
        """Start it.

        Args:
            variables: of the environment, beside those of this process.
            fork: from the process that has imported everything.
        """
        self._forked: Any = None
        self._started: subprocess.Popen[bytes] | None = None
        variables = {**environment(), **variables}
        if fork:
            self._forked = _context.Process(target=_fit, args=(list(arguments), str(log), variables))
            with _lock:
                self._forked.start()
        else:
            with log.open("ab") as file:
                self._started = subprocess.Popen(
                    [sys.executable, "-m", "sinkbed", *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    preexec_fn=functools.partial(end_with_parent, os.getpid()),
                )

    def wait(self) -> int:
        """Exit status; a negative number where a signal ended it."""
        if self._started is not None:
            return self._started.wait(timeout=math.inf)  # which looks again and again: an interrupt is seen
        while True:
            with _lock:
                status = self._forked.exitcode
            if status is not None:
                return int(status)
            multiprocessing.connection.wait([self._forked.sentinel], timeout=1.0)

    def terminate(self) -> None:
        """Ask it to save and stop."""
        if self._started is not None:
            self._started.send_signal(signal.SIGTERM)
            return
        with _lock:
            if self._forked.is_alive():
                os.kill(self._forked.pid, signal.SIGTERM)


def _end_with_study() -> None:
    """Wait for the end of the process that asked for this one.

    Not by a signal of the parent's death: that is the process forked from, which lives while one of its children does.
    """
    study = multiprocessing.parent_process()
    if study is not None:
        study.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _fit(arguments: list[str], log: str, variables: dict[str, str]) -> None:
    threading.Thread(target=_end_with_study, daemon=True).start()
    _become(variables)
    os.environ.pop("WANDB_SERVICE", None)  # of the process that runs the study
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for target, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, target)
    status = 1
    try:
        sys.argv = ["sinkbed", *arguments]
        runpy.run_module("sinkbed", run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # semaphores of its own, such as a compiler's
    os._exit(status)  # nothing that this process inherited is its own to take down


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process that has imported everything. Raises ChildProcessError where it dies."""
    with ProcessPoolExecutor(1, mp_context=_context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(f"{function.__name__}: {error}") from None
