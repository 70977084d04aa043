"""Checkpoints: when they are written, and files that are whole or absent and load with weights only."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.rundir import write_atomic

LAST = "last.ckpt"


class Checkpoints(Checkpoint):
    """Saves step-N.ckpt every few optimizer steps, after the last, and when told to stop; last.ckpt is a link to
    the newest.

    SIGINT (Ctrl-C) and SIGTERM (a scheduler) ask for a stop after the current step; a second one interrupts at once.
    Being Lightning's kind of Checkpoint, it runs after the other callbacks, whose state it saves.
    """

    def __init__(self, folder: Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"checkpoint_every: expected at least 1, found {every}")
        self.folder = folder
        self.every = every
        self.reached = -1
        self.saved: int | None = None
        """Step of the newest checkpoint, None before there is one."""
        self.stop: signal.Signals | None = None
        """The signal that asked for the stop."""
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that a run resumes from is saved already. From here on a stop is an orderly one."""
        self.reached = trainer.global_step
        self.saved = trainer.global_step if trainer.ckpt_path else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stop is not None:
            raise KeyboardInterrupt
        self.stop = signal.Signals(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{self.stop.name}: saving after this step; once more to stop at once\n".encode())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save when an optimizer step that is due has ended."""
        step = trainer.global_step
        if step == self.reached:  # a micro-batch
            return
        self.reached = step
        stop = self._told_to_stop(trainer)
        if stop or step % self.every == 0 or step == trainer.max_steps:
            self._save(trainer, pl_module, step)
        if stop:
            trainer.should_stop = True

    def _told_to_stop(self, trainer: L.Trainer) -> bool:
        """Whether any process was told; they agree, when there are several, at the logging steps."""
        told = self.stop is not None
        if trainer.world_size == 1:
            return told
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        return due and bool(trainer.strategy.reduce_boolean_decision(told, all=False))

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        pl_module.check_finite()  # type: ignore[operator]
        path = self.folder / f"step-{step:07d}.ckpt"
        trainer.save_checkpoint(path)
        self.saved = step
        if trainer.is_global_zero:
            # A hard link costs no space, and renaming it over the old one is atomic.
            link = self.folder / f".{LAST}"
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, self.folder / LAST)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._ignore_signals()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._ignore_signals()

    def _ignore_signals(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files through a temporary file in the same folder, fsync and rename."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Serialise, then replace `path`; a full disk or a crash leaves the previous file."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `load_checkpoint`."""
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU; only tensors and plain values, so that a stranger's file runs no code.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint file, found none")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: expected a checkpoint of tensors and plain values, found a file that does not load "
            f"({reason}); resume from another one in {path.parent}"
        ) from None
