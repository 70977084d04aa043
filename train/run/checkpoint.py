"""Checkpoint files: whole or absent, and loaded with weights only."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sinkbed.data.files import sync_folder
from sinkbed.train.run import directory
from sinkbed.train.run.directory import step_checkpoints
from sinkbed.train.run.sharded import load_sharded, read_meta


def save_atomic(trainer: L.Trainer, path: Path) -> None:
    """Save a checkpoint under its name when all of it is on the disk; called by every process.

    A file (one process, DDP, FSDP2 with a whole checkpoint), or a folder with a part from each process.
    """
    partial = path.with_name(f".{path.name}")
    try:
        trainer.save_checkpoint(partial)
    except BaseException:
        if trainer.is_global_zero and partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        if path.exists() and (path.is_dir() or partial.is_dir()):  # made again after resuming from an earlier one
            remove_checkpoint(path)
        os.replace(partial, path)
        sync_folder(path.parent)
    trainer.strategy.barrier()


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, first from its name, so that no half of a folder bears it."""
    if path.is_dir():
        gone = path.with_name(f".removed-{path.name}")
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink()


class SyncedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, on the disk before they count as written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write and fsync; `save_atomic` gives the file its name."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            path.unlink(missing_ok=True)
            while not isinstance(error, OSError) and error.__context__ is not None:
                error = error.__context__  # torch tells of a full disk as an internal error of its archive
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `load_checkpoint`; its bytes were compared before anything was built."""
        return load_checkpoint(Path(path), verify=False)


def load_checkpoint(
    path: Path, *, tensors: bool = True, verify: bool = True, option: str = "--ckpt_path"
) -> dict[str, Any]:
    """Load a checkpoint on the CPU; only tensors and plain values, so that a stranger's file runs no code.

    Args:
        tensors: False leaves those of a sharded checkpoint out, and maps a file's instead of reading them.
        verify: compare every byte with the checksums that the checkpoint carries.
        option: how the user chose it, for the message.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything else.
    """
    if not path.exists():
        there = ", ".join(p.name for p in step_checkpoints(path.parent)) or "none"
        raise FileNotFoundError(f"{path}: expected a checkpoint, got none of that name; there: {there}")
    try:
        if path.is_dir():
            loaded = _checked(load_sharded(path, verify) if tensors else read_meta(path, verify))
        else:
            if verify:
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                    # No checksum covers these. torch writes none, and reads no entry that they call a folder.
                    marked = [entry.filename for entry in archive.infolist() if entry.external_attr]
                for name in [damaged, *marked]:
                    if name is not None:
                        raise ValueError(f"checksum of {name.partition('/')[2]}")
            loaded = _checked(torch.load(path, map_location="cpu", weights_only=True, mmap=not tensors))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        others = [p for p in step_checkpoints(path.parent) if p.name != path.resolve().name]
        remedy = f"take another one with {option} {others[-1]}" if others else "start the run anew"
        raise ValueError(
            f"{path.resolve()}: expected a checkpoint of tensors and plain values, got a file that does not load "
            f"({reason}); {remedy}"
        ) from None
    if isinstance(loaded.get("sinkbed"), dict):
        directory.check_format(path, loaded["sinkbed"].get("format"))
    return loaded


_PARTS = {"global_step": int, "state_dict": dict, "optimizer_states": list, "lr_schedulers": list, "loops": dict,
          "callbacks": dict}  # fmt: skip


def _checked(loaded: Any) -> dict[str, Any]:
    """What was loaded, if it has the parts of a checkpoint; raises ValueError where not."""
    if not isinstance(loaded, dict):
        raise ValueError(f"a {type(loaded).__name__} in place of its parts")
    wrong = [name for name, kind in _PARTS.items() if not isinstance(loaded.get(name), kind)]
    if wrong:
        raise ValueError(f"no {' or '.join(wrong)} in it")
    return loaded
