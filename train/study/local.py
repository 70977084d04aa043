"""Running the arms of a study: on this machine side by side, each in a process of its own, by cores or by GPUs."""

import os
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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


class Runner(ABC):
    """Runs arms as futures of why each failed, or of nothing; what hinders one is its failure, not the study's."""

    def __init__(self, study: StudyConfig, runs: Sequence[ArmRun]) -> None:
        self.study = study
        self.runs = runs
        self.failed: dict[str, str] = {}

    @abstractmethod
    def start(self, runs: Sequence[ArmRun]) -> list[Future[str]]:
        """Have these arms run, as many at a time as there is room for."""

    @abstractmethod
    def stop(self) -> None:
        """Have the arms that run save and stop."""

    def overhead(self) -> float | None:
        """Seconds an arm, the median, that were neither training nor measuring; None where they are not known."""
        return None

    def run(self, progress: bool) -> None:
        """Run what is not finished. Interrupting stops the arms; they resume next time."""
        todo = [r for r in self.runs if r.status() != "finished"]
        futures = self.start(todo)
        try:
            watch(self.runs, len(self.runs) - len(todo), lambda: len(wait(futures, timeout=0.5).done), progress)
        except BaseException:
            self.stop()
            raise
        for run, future in zip(todo, futures, strict=True):
            error = future.exception()
            if failed := future.result() if error is None else _reason(error):
                self.failed[run.folder.name] = failed


def _reason(error: BaseException) -> str:
    """The last line of an error; of what may not be meant for a user, the kind too."""
    lines = str(error).strip().splitlines()
    kind = [] if lines and isinstance(error, ValueError | OSError) else [type(error).__name__]
    return ": ".join((*kind, *lines[-1:]))


class LocalRunner(Runner):
    """Runs arms on this machine, each `sinkbed fit` in a process of its own with its output in fit.log."""

    def __init__(self, study: StudyConfig, runs: Sequence[ArmRun]) -> None:
        super().__init__(study, runs)
        self.places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        places = slots(study)
        for place in places:
            self.places.put(place)
        self.pool = ThreadPoolExecutor(len(places))
        self.processes: dict[str, FitProcess] = {}
        self.seconds: dict[Path, float] = {}
        """How long each arm took that was started anew, from its turn to its end."""
        self.stopping = False

    def start(self, runs: Sequence[ArmRun]) -> list[Future[str]]:
        """A thread waits for each process."""
        return [self.pool.submit(self.run_arm, run) for run in runs]

    def stop(self) -> None:
        """Terminate the processes, and wait for them."""
        self.stopping = True
        for process in list(self.processes.values()):
            process.terminate()
        self.pool.shutdown()

    def run_arm(self, run: ArmRun) -> str:
        """Start or resume one arm and wait for it; why it failed, or nothing."""
        if self.stopping:
            return ""
        place = self.places.get()
        name, began = run.folder.name, time.perf_counter()
        try:
            arguments = begin(run, self.study.name)
            if arguments is None:
                return ""
            process = FitProcess(arguments, run.folder / LOG, place, fork=run.can_be_forked)
            self.processes[name] = process
            if self.stopping:  # told to stop between the check above and here
                process.terminate()
            status = process.wait()
            if "--ckpt_path" not in arguments:
                self.seconds[run.folder] = time.perf_counter() - began
            return "" if self.stopping else conclude(run, status)
        finally:
            self.processes.pop(name, None)
            self.places.put(place)

    def overhead(self) -> float | None:
        """Its start, its files, its end."""
        files = {folder / directory.MEASUREMENT: seconds for folder, seconds in self.seconds.items()}
        spent = [s - sum(directory.read_json(f)["seconds"].values()) for f, s in files.items() if f.exists()]
        return median(spent) if spent else None


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
