"""The runner of one machine: arms side by side, each in a process of its own, by cores or by GPUs."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from statistics import median
from typing import Any

from sinkbed.data.prepare.prepare import available_cores
from sinkbed.train.run import directory
from sinkbed.train.study.arms import LOG, ArmRun, begin, conclude
from sinkbed.train.study.file import StudyConfig
from sinkbed.train.study.processes import FitProcess


def visible_gpus() -> list[str]:
    """GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def slots(study: StudyConfig) -> list[dict[str, str]]:
    """A place for each arm that runs at a time: the variables that give it its GPUs.

    Raises ValueError where the study asks for GPUs that are not there.
    """
    if not study.gpus:
        return [{}] * (study.workers or max(1, available_cores() // study.cpus))
    gpus = visible_gpus()
    if study.gpus < 1:
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(int(1 / study.gpus)) for gpu in gpus]
    else:
        each = int(study.gpus)
        groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
        places = [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
    if not places:
        raise ValueError(
            f"study.gpus: expected {study.gpus:g} for each arm, got {len(gpus)} on this machine; use --ray ADDRESS "
            "for a cluster that has them, or another --size"
        )
    return places[: study.workers]


class Runner:
    """Runs arms, each `sinkbed fit` in a process of its own with its output in fit.log."""

    def __init__(self, study: StudyConfig, runs: Sequence[ArmRun]) -> None:
        self.study = study
        self.runs = runs
        self.places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        self.workers = 0
        for place in slots(study):
            self.places.put(place)
            self.workers += 1
        self.processes: dict[str, FitProcess] = {}
        self.failed: dict[str, str] = {}
        self.seconds: dict[Path, float] = {}
        """How long each arm took that was started anew, from its turn to its end."""
        self.stopping = False

    def run_arm(self, run: ArmRun) -> None:
        """Start or resume one arm and wait for it; what hinders that is the arm's failure, not the study's."""
        if self.stopping:
            return
        place = self.places.get()
        try:
            self._run_arm(run, place)
        except Exception as error:  # the folder is in use, the disk is full, no process can be made or asked after
            self.failed[run.folder.name] = str(error) or type(error).__name__
        finally:
            self.processes.pop(run.folder.name, None)
            self.places.put(place)

    def _run_arm(self, run: ArmRun, place: dict[str, str]) -> None:
        name, began = run.folder.name, time.perf_counter()
        arguments = begin(run, self.study.name)
        if arguments is None:
            return
        process = FitProcess(arguments, run.folder / LOG, place, fork=run.can_be_forked)
        self.processes[name] = process
        if self.stopping:  # told to stop between the check above and here
            process.terminate()
        status = process.wait()
        del self.processes[name]
        if "--ckpt_path" not in arguments:
            self.seconds[run.folder] = time.perf_counter() - began
        if not self.stopping and (failed := conclude(run, status)):
            self.failed[name] = failed

    def overhead(self) -> float | None:
        """Seconds an arm, the median, that were neither training nor measuring: its start, its files, its end."""
        files = {folder / directory.MEASUREMENT: seconds for folder, seconds in self.seconds.items()}
        spent = [s - sum(directory.read_json(f)["seconds"].values()) for f, s in files.items() if f.exists()]
        return median(spent) if spent else None

    def run(self, progress: bool) -> None:
        """Run what is not finished. Interrupting stops the arms; they resume next time."""
        todo = [r for r in self.runs if r.status() != "finished"]
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self.run_arm, run) for run in todo]
            try:
                watch(self.runs, len(self.runs) - len(todo), lambda: _done(futures), progress)
            except BaseException:
                self.stopping = True
                for process in list(self.processes.values()):
                    process.terminate()
                raise
        for future in futures:
            future.result()


def _done(futures: Sequence[Future[Any]]) -> int:
    return len(wait_for(futures, timeout=0.5).done)


def watch(runs: Sequence[ArmRun], finished_before: int, done: Callable[[], int], progress: bool) -> None:
    """Show how far the arms are until all are done; `done` waits a moment and counts those of this time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("arms", total=len(runs), completed=finished_before, now="")
        last_line = ""
        while True:
            count = finished_before + done()
            if progress:
                bar.update(task, completed=count, now="  ".join(_progress_of(runs)))
            line = f"{count} of {len(runs)} arms done"
            if progress and not bar.console.is_terminal and line != last_line:
                print(line, flush=True)
                last_line = line
            if count == len(runs):
                return


def _progress_of(runs: Sequence[ArmRun]) -> list[str]:
    """A word on each arm that is running: those with points and no measurement yet."""
    lines = []
    for folder in (r.folder for r in runs):
        path: Path = folder / directory.METRICS
        if (folder / directory.MEASUREMENT).exists() or not path.exists():
            continue
        last: dict[str, Any] = {}
        try:
            for point in directory.read_metrics(path):
                last |= point
        except (OSError, ValueError):
            continue
        loss = last.get("train/loss")
        lines.append(f"{folder.name}: step {last.get('step', 0)}" + (f" loss {loss:.2f}" if loss else ""))
    return lines
