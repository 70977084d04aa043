"""Sharded training: FSDP2 as a Lightning strategy, `trainer.strategy: fsdp2` or `fsdp2_sharded`.

`fsdp2` writes whole checkpoints, files as any other run's. `fsdp2_sharded` writes a folder: a part from each process
in torch.distributed.checkpoint's format (tensors only), meta.ckpt with everything else, and the checksum of every
file. Each kind loads under every strategy and number of processes.
"""

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from sinkbed.data.files import sha256_file, write_json
from sinkbed.model import Decoder
from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import load_checkpoint
from sinkbed.train.run.sharded import META, PlainReader, flatten, is_whole, read_meta, unflatten


def shard(decoder: Decoder, mesh: Any) -> None:
    """Shard a decoder over a device mesh, block by block (arXiv 2304.11277)."""
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh)


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, with optimizer states named by parameter."""

    def __init__(
        self,
        sharded_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
            **kwargs,
        )
        self.sharded_checkpoint = sharded_checkpoint

    def setup_environment(self) -> None:
        """One mesh of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning loads model and optimizer as of any strategy, from what `load_checkpoint` returned."""
        return True

    def _options(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=not self.sharded_checkpoint, cpu_offload=True)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State by parameter name; whole on rank 0 and empty elsewhere, or this process's shards."""
        assert self.model is not None
        return get_optimizer_state_dict(
            self.model, getattr(optimizer, "_optimizer", optimizer), options=self._options()
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """A file from rank 0, or a folder from all."""
        path = Path(self.broadcast(filepath))
        if not self.sharded_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            return
        if self.is_global_zero and path.exists():
            shutil.rmtree(path)
        self.barrier()
        try:
            dcp.save(flatten(checkpoint), storage_writer=dcp.FileSystemWriter(path))
        except CheckpointException as error:  # a BaseException, of which every process learns
            failures = [failure for failure, _ in error.failures.values()]
            full = next((f for f in failures if isinstance(f, OSError)), None)
            if full is not None:
                raise OSError(full.errno, full.strerror, str(path)) from None
            raise RuntimeError(f"{path}: not saved, {failures}") from error
        sums = {p.name: sha256_file(p) for p in path.glob(f"__{self.global_rank}_*")}
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, sums)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path / META)
            sums = {p.name: sha256_file(p) for p in (path / META, path / ".metadata")}
            write_json(
                path / directory.CHECKSUMS, {name: value for part in [*everyone, sums] for name, value in part.items()}
            )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A file as any other; of a folder, this process's shards."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return load_checkpoint(path, verify=False)
        assert self.model is not None
        checkpoint = read_meta(path, verify=False)
        checkpoint["state_dict"] = get_model_state_dict(self.model)
        for state, optimizer in zip(checkpoint["optimizer_states"], self.optimizers, strict=True):
            state["state"] = get_optimizer_state_dict(self.model, optimizer)["state"]
        tensors = flatten(checkpoint, keep=True)
        dcp.load(tensors, storage_reader=PlainReader(path))
        unflatten(tensors, checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Weights, whole or this process's shards."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=is_whole(checkpoint), strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Optimizer states, whole or this process's shards."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=is_whole(checkpoint))
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, state, options=options)


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2, whole checkpoints", sharded_checkpoint=False)
StrategyRegistry.register("fsdp2_sharded", FSDP2Strategy, "FSDP2, sharded checkpoints", sharded_checkpoint=True)
