"""When checkpoints are written: every few steps, at log-spaced ones, the best, the last, and when told to stop."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import remove_checkpoint, save_atomic


class Checkpoints(Checkpoint):
    """Saves step-N.ckpt; last.ckpt is a link to the newest.

    A checkpoint is saved every few optimizer steps, at log-spaced steps (sinks form early), where the validation loss
    is the lowest so far, after the last step, and when told to stop. The newest, the best and the log-spaced ones stay,
    the others go as soon as a newer one is whole.

    SIGINT (Ctrl-C) and SIGTERM (a scheduler) ask for a stop after the current step, SIGUSR1 (SLURM before the end of
    the time limit) for that and a requeue. A scheduler and a launcher may both send it: only a later Ctrl-C interrupts
    at once. Several processes agree on a stop one step later, whichever of them was told.
    Being Lightning's kind of Checkpoint, it runs after the other callbacks, whose state it saves.
    """

    def __init__(
        self, folder: Path, *, every: int, points: int, metrics: Path, loss: Callable[[int], float | None]
    ) -> None:
        """Configure the saving.

        Args:
            every: steps between checkpoints; points: log-spaced ones that stay.
            metrics: the run's metrics.jsonl, which every checkpoint holds a copy of.
            loss: the validation loss measured after a step, None where none was.
        """
        self.folder = folder
        self.every = every
        self.points = points
        self.metrics = metrics
        self.loss = loss
        self.best: tuple[int, float] | None = None
        """Step and validation loss of the best checkpoint."""
        self.kept: list[int] = []
        """Steps whose checkpoints stay; where a run was made longer, those of its former length too."""
        self.resumed = False
        """Whether this process goes on from a checkpoint of this run."""
        self.restored = ""
        """metrics.jsonl as the checkpoint saved it that this process resumed from."""
        self.reached = -1
        self.saved: int | None = None
        """Step of the newest checkpoint, None before there is one."""
        self.stop: signal.Signals | None = None
        """The signal that asked for the stop, in any process once they have agreed."""
        self.run: dict[str, Any] = {}
        """Content of run.json, for the checkpoints."""
        self._told: torch.Tensor | None = None
        self._told_at = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: which one is the best, whose run it is, and every point so far."""
        return {
            "best": self.best,
            "kept": self.kept,
            "run": self.run,
            "metrics": self.metrics.read_text() if self.metrics.exists() else "",
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint; the points go back through `directory.restore_metrics`."""
        self.best, self.restored, self.run = state_dict["best"], state_dict["metrics"], state_dict["run"]
        self.kept = state_dict["kept"]
        self.resumed = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that a run resumes from is saved already, and from now on it is its last one, though a later one of
        an earlier try may be there. From here on a stop is an orderly one."""
        self.reached = trainer.global_step
        before = [step for step in self.kept if step <= self.reached]
        self.kept = sorted({*before, *directory.kept_steps(self.points, trainer.max_steps)})
        resumed = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if resumed is not None and resumed.resolve().parent == self.folder.resolve():  # no fork
            self.saved = trainer.global_step
            if trainer.is_global_zero:
                self._link(self._named(resumed.resolve(), trainer.global_step))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.stop is not None:
            if number == signal.SIGINT and now - self._told_at > 1:
                raise KeyboardInterrupt
            return
        self.stop, self._told_at = signal.Signals(number), now
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.stop.name}: saving after this step; Ctrl-C stops at once\n".encode())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save when an optimizer step that is due has ended."""
        step = trainer.global_step
        if step == self.reached:  # a micro-batch
            return
        self.reached = step
        stop = self._told_to_stop(trainer) or trainer.should_stop  # a callback may have ended the run
        loss = self.loss(step)
        if loss is not None and trainer.world_size > 1:
            # Whether this step is saved is one process's decision: their losses may differ in the last bit.
            loss = trainer.strategy.broadcast(loss)
        best = loss is not None and (self.best is None or loss < self.best[1])
        if best:
            self.best = (step, loss)  # type: ignore[assignment]
        if stop or best or step in self.kept or step % self.every == 0 or step == trainer.max_steps:
            self._save(trainer, pl_module, step)
            if trainer.is_global_zero:
                self._remove()
        if stop:
            trainer.should_stop = True

    def _remove(self) -> None:
        """Remove checkpoints that a newer one has replaced."""
        for path in directory.step_checkpoints(self.folder):
            step = directory.step_of(path)
            if step < self.reached and step not in self.kept and (self.best is None or step != self.best[0]):
                remove_checkpoint(path)

    def _told_to_stop(self, trainer: L.Trainer) -> bool:
        """Whether any process was told. What they told each other in one step is read in the next one, so that an
        accelerator need not wait for it."""
        if trainer.world_size > 1:
            agreed = 0 if self._told is None else int(self._told)
            signal_here = torch.tensor(self.stop or 0, device=trainer.strategy.root_device)
            self._told = trainer.strategy.reduce(signal_here, reduce_op="max")  # type: ignore[assignment]
            if not agreed:
                return False
            self.stop = signal.Signals(agreed)
        return self.stop is not None

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        pl_module.check_finite()  # type: ignore[operator]
        pl_module.check_weights()  # type: ignore[operator]
        path = self.folder / f"step-{step:07d}.ckpt"
        save_atomic(trainer, path)
        self.saved = step
        if trainer.is_global_zero:
            self._link(path)

    def _named(self, path: Path, step: int) -> Path:
        """A checkpoint under the name of its step: a copy that follows links has made one of last.ckpt itself."""
        if path.name != directory.LAST:
            return path
        named = self.folder / f"step-{step:07d}.ckpt"
        if named.exists():
            remove_checkpoint(named)
        return path.rename(named)

    def _link(self, path: Path) -> None:
        """Have last.ckpt name a checkpoint; atomic, also over the old link."""
        last = self.folder / directory.LAST
        if last.is_dir() and not last.is_symlink():
            remove_checkpoint(last)
        link = self.folder / f".{directory.LAST}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, last)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give them back, too: Lightning tears no callback down after an error."""
        self.teardown(trainer, pl_module, "fit")


def remove_partial(folder: Path) -> None:
    """Remove what a kill in the middle of writing left."""
    for partial in (p for name in (".step-*", ".removed-*", f".{directory.LAST}") for p in folder.glob(name)):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink()
