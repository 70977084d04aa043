"""Sharded checkpoints: a folder with a part from each process in torch.distributed.checkpoint's format, read so that
nothing in it runs code."""

import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata

from sinkbed.data.files import sha256_file
from sinkbed.train.run import directory

META = "meta.ckpt"

_SEPARATOR = "|"  # never in a parameter's name


def load_sharded(path: Path, verify: bool = True) -> dict[str, Any]:
    """A sharded checkpoint as one whole on the CPU, in a single process.

    Raises ValueError for a folder that is damaged or holds anything but tensors.
    """
    checkpoint = read_meta(path, verify)
    entries: dict[str, Any] = _read_metadata(path).state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        dcp.load(tensors, storage_reader=PlainReader(path), no_dist=True)
    unflatten(tensors, checkpoint)
    return checkpoint


def read_meta(path: Path, verify: bool = True) -> dict[str, Any]:
    """Everything but the tensors of a sharded checkpoint, after its checksums were compared (`verify`).

    Raises ValueError that names what is damaged or missing.
    """
    sums = path / directory.CHECKSUMS
    if not sums.is_file():
        raise ValueError(f"no {directory.CHECKSUMS}")
    known = directory.read_json(sums)
    for name in {META, ".metadata", *known}:
        file = path / name
        if (
            file.parent != path
            or not file.is_file()
            or name not in known
            or (verify and sha256_file(file) != known[name])
        ):
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


class PlainReader(dcp.FileSystemReader):
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


def flatten(checkpoint: dict[str, Any], keep: bool = False) -> dict[str, Any]:
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


def unflatten(tensors: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put the tensors of `flatten` back."""
    for flat, value in tensors.items():
        where, name, *rest = flat.split(_SEPARATOR)
        if where == "model":
            checkpoint["state_dict"][name] = value
        else:
            checkpoint["optimizer_states"][int(where)]["state"].setdefault(name, {})[rest[0]] = value


def is_whole(checkpoint: Mapping[str, Any]) -> bool:
    from torch.distributed.tensor import DTensor

    return not any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values())
