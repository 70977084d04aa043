"""Checkpoints of other trainers, a file each, as models of `transformers`, which `model.hf.adapter` measures.

A format is a `Foreign` that registers itself under the name of its file. Checkpoints are read as data: no code that a
file names is run.
"""

import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbed.model.hf.tokenizer import read_tokenizer
from sinkbed.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = Registry("checkpoint", __name__)


def foreign_at(path: Path) -> "Foreign | None":
    """The checkpoint of another trainer that a file or folder is, by its name and what is in it; imports no torch.

    Raises ValueError for one that is damaged or incomplete.
    """
    for name in FORMATS.names:
        if (file := FORMATS[name].weights_file(path)) is not None:
            return FORMATS[name](file)  # type: ignore[no-any-return]
    return None


class Foreign(ABC):
    """A checkpoint of another trainer. Raises ValueError for a file of weights that is damaged."""

    def __init__(self, file: Path) -> None:
        self.file = file
        # The directory of a zip file is at its end.
        if not zipfile.is_zipfile(file):
            raise ValueError(
                f"{file}: expected a file that torch.save wrote, got one that is cut off, damaged or of another kind; "
                "copy it again"
            )

    def read_again(self) -> "Foreign":
        """The checkpoint that the file holds now: a trainer may have written to it since.

        Raises ValueError where it is another model's.
        """
        now = type(self)(self.file)
        if now.config.to_dict() != self.config.to_dict():
            raise ValueError(
                f"{self.file}: expected the model that was checked, got another that was written there since; run the "
                "same command again"
            )
        return now

    @classmethod
    @abstractmethod
    def weights_file(cls, path: Path) -> Path | None:
        """The file of weights, where `path` has the name of a checkpoint of this format or is a folder with one."""

    @abstractmethod
    def make_config(self) -> Any:
        """The config of the equivalent model of `transformers`; what it raises is reported of the settings."""

    @abstractmethod
    def targets(self, parameters: Collection[str]) -> dict[str, Sequence[str]]:
        """Tensor of the checkpoint -> `parameters` of the equivalent model that it holds. One that none holds is a bias
        of zeros."""

    @property
    @abstractmethod
    def tensors(self) -> "dict[str, Tensor]":
        """The weights under the trainer's names."""

    def shape(self, name: str, targets: "Sequence[Tensor]") -> tuple[int, ...]:
        """Of a tensor that holds parameters: by default one below the other."""
        return (sum(len(target) for target in targets), *targets[0].shape[1:])

    def split(self, name: str, tensor: "Tensor", count: int) -> "Sequence[Tensor]":
        """The `count` parameters that a tensor holds; by default it is one."""
        assert count == 1
        return [tensor]

    def tokenizer(self, path: Path | None = None) -> Any:
        """The tokenizer at `path`, by default the checkpoint's own. Raises ValueError where there is none."""
        return read_tokenizer(path or self.file.parent, self.config.vocab_size)

    def texts(self, tokenizer: Any) -> Iterator[str] | None:
        """The documents that the trainer validated on, where they are at hand."""
        return None

    @property
    def config(self) -> Any:
        """Of the equivalent model. Raises ValueError for a file or settings that make none."""
        return self._made[0]

    @cached_property
    def _made(self) -> "tuple[Any, dict[str, Tensor]]":
        """The equivalent model's config, and its parameters without values."""
        import torch
        import transformers

        dtype = next(iter(self.tensors.values())).dtype  # first: what is wrong with the file is not the settings' fault
        try:
            config = self.make_config()
            config.dtype = dtype
            with torch.device("meta"):
                return config, transformers.AutoModelForCausalLM.from_config(config).state_dict()
        except Exception as error:  # `transformers` raises several kinds
            problem = " ".join(str(error).split())
            raise ValueError(f"{self.file}: expected the settings of a model, got: {problem}") from error

    def weights(self) -> "dict[str, Tensor]":
        """The parameters of the equivalent model, copied, so that a trainer may overwrite the file.

        Raises ValueError for tensors that are missing, left over or of another shape.
        """
        import torch

        config, parameters = self._made
        targets, tensors = self.targets(parameters), self.tensors
        self._check(tensors, {t: self.shape(t, [parameters[n] for n in names]) for t, names in targets.items()})
        missing = parameters.keys() - {name for names in targets.values() for name in names}
        assert all(name.endswith(".bias") for name in missing)
        weights = {name: torch.zeros(parameters[name].shape, dtype=config.dtype) for name in missing}
        for tensor, names in targets.items():
            parts = self.split(tensor, tensors[tensor], len(names))
            copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
            weights |= dict(zip(names, copies, strict=True))
        return weights

    def _check(self, tensors: "Mapping[str, Tensor]", expected: Mapping[str, tuple[int, ...]]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        problems = {
            "missing": sorted(expected.keys() - shapes.keys()),
            "left over": sorted(shapes.keys() - expected.keys()),
            "of another shape": [
                f"{name} {list(shapes[name])} for {list(expected[name])}"
                for name in sorted(expected.keys() & shapes.keys())
                if shapes[name] != expected[name]
            ],
        }
        if any(problems.values()):
            listed = [
                f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for what, names in problems.items()
                if names
            ]
            raise ValueError(
                f"{self.file}: expected the {len(expected)} tensors of its settings, got {', '.join(listed)}; give "
                "a model that was changed as a Hugging Face folder"
            )


def load_tensors(file: Path) -> Any:
    """What `torch.save` wrote, tensors mapped from disk.

    Raises ValueError for a damaged file, and for objects whose code would have to be run.
    """
    import torch

    paths = [f"pathlib{part}.{kind}Path" for part in ("", "._local") for kind in ("Posix", "Windows")]
    try:
        with torch.serialization.safe_globals([(Path, name) for name in paths]):  # litgpt saves the paths it was given
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its parts do
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file}: expected tensors and plain values, got {code[1]}, whose code is not run; if you trust the "
            "file, load it with weights_only=False and save it again without that object"
            if code
            else f"{file}: expected what torch.save writes, got: {' '.join(str(error).split())[:200]}; copy it again"
        ) from error


def without_prefix(tensors: Any, file: Path) -> "dict[str, Tensor]":
    """A state dict without the prefix that `torch.compile` gives its names. Raises ValueError for anything else."""
    import torch

    items = tensors.items() if isinstance(tensors, dict) else ()
    if not items or not all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in items):
        raise ValueError(f"{file}: expected the tensors of a model by name, got {type(tensors).__name__} without them")
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in items}
