"""Checkpoints: when they are written, and files that are whole or absent and load with weights only."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.rundir import write_atomic

LAST = "last.ckpt"


class Checkpoints(Checkpoint):
    """Saves step-N.ckpt every few optimizer steps and after the last; last.ckpt is a link to the newest.

    Being Lightning's kind of Checkpoint, it runs after the other callbacks, whose state it saves.
    """

    def __init__(self, folder: Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"checkpoint_every: expected at least 1, found {every}")
        self.folder = folder
        self.every = every
        self.saved = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that a run resumes from is saved already."""
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save when an optimizer step that is due has ended."""
        step = trainer.global_step
        if step == self.saved or (step % self.every and step != trainer.max_steps):
            return
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
