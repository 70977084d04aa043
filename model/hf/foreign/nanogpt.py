"""nanoGPT: `ckpt.pt`, a GPT-2 with or without biases, as its train.py saves it (github.com/karpathy/nanoGPT).

It is read as today's model.py computes it, with an exact GELU. Until June 2023 GELU had the tanh form; no checkpoint
tells which it is.
"""

import pickle
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbed.model.hf.foreign import FORMATS, Foreign, load_tensors, without_prefix

if TYPE_CHECKING:
    from torch import Tensor

_SETTINGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Matrices that GPT-2 of `transformers` keeps as [inputs, outputs]."""


@FORMATS.register("nanogpt")
class NanoGPT(Foreign):
    """A `ckpt.pt`, or the folder that has one."""

    @classmethod
    def weights_file(cls, path: Path) -> Path | None:
        """A file `*.pt`, or `ckpt.pt` in a folder."""
        if path.is_dir() and not (path / "config.json").is_file():
            path = path / "ckpt.pt"
        return path if path.suffix == ".pt" and path.is_file() else None

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """What train.py saved. Raises ValueError for another file."""
        checkpoint = load_tensors(self.file)
        if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
            kind = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
            raise ValueError(
                f"{self.file}: expected a checkpoint of nanoGPT, with model and model_args, got {kind[:200]}; give "
                "models of other trainers as a Hugging Face folder"
            )
        return checkpoint

    @property
    def tensors(self) -> "dict[str, Tensor]":
        """The weights; causal masks, which nanoGPT saves where torch has no flash attention, are none."""
        tensors = without_prefix(self.checkpoint["model"], self.file)
        return {n: t for n, t in tensors.items() if not (n.endswith(".attn.bias") and t.dim() == 4)}

    def make_config(self) -> Any:
        """GPT-2's."""
        import transformers

        settings = {"bias": True, **self.checkpoint["model_args"]}
        missing = [name for name in _SETTINGS if not isinstance(settings.get(name), int)]
        unknown = [name for name in settings if settings[name] and name not in (*_SETTINGS, "bias", "dropout")]
        if missing or unknown:
            raise ValueError(
                f"model_args that lack {missing} and add {unknown} to {', '.join(_SETTINGS)}, bias and dropout; give a "
                "model that was changed as a Hugging Face folder"
            )
        return transformers.GPT2Config(
            **{name: settings[name] for name in _SETTINGS if name != "block_size"},
            n_positions=settings["block_size"],
            activation_function="gelu",
            layer_norm_epsilon=1e-5,
            tie_word_embeddings=True,  # matrices that differ in the file stay apart
            bos_token_id=None,
            eos_token_id=None,
        )

    def targets(self, parameters: Collection[str]) -> dict[str, Sequence[str]]:
        """The names are GPT-2's."""
        biased = self.checkpoint["model_args"].get("bias", True)
        return {name: [name] for name in parameters if biased or not name.endswith(".bias")}

    def shape(self, name: str, targets: "Sequence[Tensor]") -> tuple[int, ...]:
        """See `Foreign`."""
        return tuple(targets[0].shape[::-1] if name.endswith(_TRANSPOSED) else targets[0].shape)

    def split(self, name: str, tensor: "Tensor", count: int) -> "Sequence[Tensor]":
        """See `Foreign`."""
        return [tensor.T if name.endswith(_TRANSPOSED) else tensor]

    def tokenizer(self, path: Path | None = None) -> Any:
        """Of the `tokenizers` library, or the characters of a meta.pkl, by default the dataset's."""
        path = path or self._data("meta.pkl")
        if path is None:
            raise ValueError(
                f"{self.file}: expected a tokenizer, got none (no meta.pkl of its dataset, {self._dataset!r}); give "
                "--tokenizer with a meta.pkl of characters or a tokenizer.json. GPT-2's: hf download "
                "openai-community/gpt2 tokenizer.json tokenizer_config.json --local-dir gpt2, then --tokenizer gpt2"
            )
        if path.suffix != ".pkl":
            return super().tokenizer(path)
        tokenizer, size = character_tokenizer(path), self.config.vocab_size
        if len(tokenizer) != size:
            raise ValueError(
                f"{path}: expected {size} characters, as many as the model has embeddings, got {len(tokenizer)}; give "
                "the meta.pkl that it was trained with with --tokenizer"
            )
        return tokenizer

    def texts(self, tokenizer: Any) -> Iterator[str] | None:
        """The dataset's val.bin: its documents, or where no token ends them, rows as long as the context."""
        path = self._data("val.bin")
        return None if path is None else _documents(path, tokenizer, self.config.n_positions)

    @property
    def _dataset(self) -> str:
        settings = self.checkpoint.get("config")
        return str(settings.get("dataset", "")) if isinstance(settings, dict) else ""

    def _data(self, name: str) -> Path | None:
        """A file of the dataset, in `data` of this folder, where sample.py has it, or of one above the checkpoint."""
        roots = [Path(), *self.file.absolute().parents]
        candidates = [root / "data" / self._dataset / name for root in roots]
        return next((candidate for candidate in candidates if candidate.is_file()), None)


def _documents(path: Path, tokenizer: Any, length: int) -> Iterator[str]:
    import numpy

    size, eos = path.stat().st_size, tokenizer.eos_token_id
    if not size or size % 2:
        raise ValueError(f"{path}: expected token ids of two bytes, got {size} bytes; prepare the dataset again")
    ids = numpy.memmap(path, dtype=numpy.uint16, mode="r")
    if ids.max() >= len(tokenizer):
        raise ValueError(
            f"{path}: expected ids below {len(tokenizer)}, the tokens of the tokenizer, got {ids.max()}; give the "
            "tokenizer of this text with --tokenizer, or another text with --prompts"
        )
    ends = numpy.arange(length, len(ids), length) if eos is None else numpy.flatnonzero(ids == eos)
    yield from (tokenizer.decode(part, skip_special_tokens=True) for part in numpy.split(ids, ends))


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain data alone: any class or function that a pickle names is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name}, whose code is not run")


def character_tokenizer(path: Path) -> Any:
    """A token a character, as a meta.pkl of nanoGPT has it (`stoi`). Raises ValueError for another file."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    try:
        with path.open("rb") as file:
            ids = dict(_PlainUnpickler(file).load()["stoi"])
        plain = all(isinstance(c, str) and len(c.encode().decode()) == 1 and type(i) is int for c, i in ids.items())
        if not plain or sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("tokens that are no characters, or ids with gaps")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"{path}: expected the meta.pkl of a nanoGPT dataset, with an id for each character (stoi), got: {error!s}"
        ) from error

    class Characters(transformers.PreTrainedTokenizerFast):
        """Refuses, by name, characters without an id."""

        def __call__(self, text: str, **options: Any) -> Any:
            unknown = sorted(set(text) - ids.keys())
            if unknown:
                raise ValueError(
                    f"the text: expected the {len(ids)} characters of {path}, got also "
                    f"{', '.join(map(repr, unknown[:8]))}; give a text without them"
                )
            return super().__call__(text, **options)

    backend = Tokenizer(models.WordLevel(ids, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Characters(tokenizer_object=backend)
