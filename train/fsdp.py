"""Sharded training: FSDP2 as a Lightning strategy, `trainer.strategy: fsdp2` or `fsdp2_sharded`.

`fsdp2` writes whole checkpoints, files as any other run's. `fsdp2_sharded` writes a folder: a part from each process
in torch.distributed.checkpoint's format (tensors only), meta.ckpt with everything else, and the checksum of every
file. Each kind loads under every strategy and number of processes.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import shutil
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from model import Decoder
from train import rundir

META, CHECKSUMS = "meta.ckpt", rundir.CHECKSUMS
_SEPARATOR = "|"  # never in a parameter's name


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
            dcp.save(_flatten(checkpoint), storage_writer=dcp.FileSystemWriter(path))
        except CheckpointException as error:  # a BaseException, of which every process learns
            failures = [failure for failure, _ in error.failures.values()]
            full = next((f for f in failures if isinstance(f, OSError)), None)
            if full is not None:
                raise OSError(full.errno, full.strerror, str(path)) from None
            raise RuntimeError(f"{path}: not saved, {failures}") from error
        sums = {p.name: _sha256(p) for p in path.glob(f"__{self.global_rank}_*")}
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, sums)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path / META)
            sums = {p.name: _sha256(p) for p in (path / META, path / ".metadata")}
            rundir.write_json(
                path / CHECKSUMS, {name: value for part in [*everyone, sums] for name, value in part.items()}
            )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A file as any other; of a folder, this process's shards."""
        from train.checkpoint import load_checkpoint

        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return load_checkpoint(path, verify=False)
        assert self.model is not None
        checkpoint = read_meta(path, verify=False)
        checkpoint["state_dict"] = get_model_state_dict(self.model)
        for state, optimizer in zip(checkpoint["optimizer_states"], self.optimizers, strict=True):
            state["state"] = get_optimizer_state_dict(self.model, optimizer)["state"]
        tensors = _flatten(checkpoint, keep=True)
        dcp.load(tensors, storage_reader=_Reader(path))
        _unflatten(tensors, checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Weights, whole or this process's shards."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=_is_whole(checkpoint), strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Optimizer states, whole or this process's shards."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=_is_whole(checkpoint))
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, state, options=options)


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2, whole checkpoints", sharded_checkpoint=False)
StrategyRegistry.register("fsdp2_sharded", FSDP2Strategy, "FSDP2, sharded checkpoints", sharded_checkpoint=True)


def load_sharded(path: Path, verify: bool = True) -> dict[str, Any]:
    """A sharded checkpoint as one whole on the CPU, in a single process.

    Raises ValueError for a folder that is damaged or holds anything but tensors.
    """
    checkpoint = read_meta(path, verify)
    entries: dict[str, Any] = _read_metadata(path).state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        dcp.load(tensors, storage_reader=_Reader(path), no_dist=True)
    _unflatten(tensors, checkpoint)
    return checkpoint


def read_meta(path: Path, verify: bool = True) -> dict[str, Any]:
    """Everything but the tensors of a sharded checkpoint, after its checksums were compared (`verify`).

    Raises ValueError that names what is damaged or missing.
    """
    sums = path / CHECKSUMS
    if not sums.is_file():
        raise ValueError(f"no {CHECKSUMS}")
    known = rundir.read_json(sums)
    for name in {META, ".metadata", *known}:
        file = path / name
        if file.parent != path or not file.is_file() or name not in known or (verify and _sha256(file) != known[name]):
            raise ValueError(f"checksum of {name}")
    for info in (_read_metadata(path).storage_data or {}).values():
        if info.relative_path not in known:
            raise ValueError(f"checksum of {info.relative_path}")
    meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
    return meta


_PLAIN = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                     "StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("float16", "bfloat16", "float32", "float64", "int64", "contiguous_format")),
    ("pathlib", "PosixPath"),
    ("torch._utils", "_rebuild_memory_format"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's .metadata, a pickle, without calling anything but what it is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise ValueError(f"{module}.{name} in .metadata")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, which would unpickle anything, with `_read_metadata` in its place."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read_metadata(path: Path) -> Metadata:
    """The index of a sharded checkpoint; raises ValueError for one that holds anything but tensors of this folder."""
    with (path / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise ValueError("a .metadata of another kind")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError("something else than tensors")
        # Chunks never overlap, so that their sizes say whether they are all; memory of one that is not there would
        # be taken as it is.
        chunks = [chunk for chunk in {tuple(c.offsets): c for c in entry.chunks}.values() if _is_inside(chunk, entry)]
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(entry.size):
            raise ValueError(f"not all of {name}")
    inside = path.resolve()
    for info in (metadata.storage_data or {}).values():
        if (path / info.relative_path).resolve().parent != inside:
            raise ValueError(f"a path out of the folder, {info.relative_path}")
    return metadata


def _is_inside(chunk: ChunkStorageMetadata, entry: TensorStorageMetadata) -> bool:
    edges = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
    return all(offset >= 0 and offset + size <= whole for offset, size, whole in edges)


def _flatten(checkpoint: dict[str, Any], keep: bool = False) -> dict[str, Any]:
    """The tensors of a checkpoint by one flat name each; taken out of it, unless they are to be kept."""
    tensors = {_SEPARATOR.join(("model", name)): value for name, value in checkpoint["state_dict"].items()}
    for index, state in enumerate(checkpoint["optimizer_states"]):
        for name, values in state["state"].items():
            tensors |= {_SEPARATOR.join((str(index), name, key)): value for key, value in values.items()}
        if not keep:
            state["state"] = {}
    if not keep:
        checkpoint["state_dict"] = {}
    return tensors


def _unflatten(tensors: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put the tensors of `_flatten` back."""
    for flat, value in tensors.items():
        where, name, *rest = flat.split(_SEPARATOR)
        if where == "model":
            checkpoint["state_dict"][name] = value
        else:
            checkpoint["optimizer_states"][int(where)]["state"].setdefault(name, {})[rest[0]] = value


def _is_whole(checkpoint: Mapping[str, Any]) -> bool:
    from torch.distributed.tensor import DTensor

    return not any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
