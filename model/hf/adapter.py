"""Causal language models of `transformers` under our attention operator (`model.hf.attention`), so that one code
measures them and ours. No code that comes with a model is run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkbed.kernels import Mask
from sinkbed.model.decoder import DecoderOutput
from sinkbed.model.hf.attention import ATTENTION, Pass, asking, register
from sinkbed.model.hf.foreign import Foreign
from sinkbed.model.loss import token_nll
from sinkbed.model.observe import Attentions


@dataclass(frozen=True)
class Shape:
    """What measuring needs to know of a model."""

    n_layers: int
    n_heads: int


class HFModel(nn.Module):
    """A causal language model of `transformers` that is called as our decoder is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.observer: Attentions | None = None
        text = model.config.get_text_config()
        self.config = Shape(int(text.num_hidden_layers), int(text.num_attention_heads))
        self.vocab_size = int(text.vocab_size)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        gguf: str | None = None,
        foreign: Foreign | None = None,
        dtype: str = "auto",
        device_map: str | dict[str, int | str] | None = None,
    ) -> "HFModel":
        """Load a model folder, or a model of the hub by name.

        Args:
            gguf: file in that folder or repository, for weights in GGUF (needs `gguf` and `accelerate`).
            foreign: checkpoint of another trainer that the model is made from; `name` is for messages alone.
            dtype: as in `transformers`: `auto`, `float32`, `bfloat16`, ...
            device_map: as in `transformers`: `auto`, or module -> device (`cpu`, `disk`, a GPU's number); layers over
                several devices, or fetched from disk as they are needed (needs `accelerate`).

        Raises ValueError for what is no causal language model, whose attention cannot be observed, or whose files
        are damaged or lack weights, and for a package that is missing.
        """
        _check_packages(gguf, device_map)
        config = cls.checked_config(name, revision=revision, gguf=gguf, foreign=foreign)
        import transformers

        register()
        loader: Any = transformers.AutoModelForCausalLM
        source: dict[str, Any] = {"pretrained_model_name_or_path": name, **_source(revision, gguf)}
        if foreign is not None:
            loader = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            source = {"pretrained_model_name_or_path": None, "config": config, "state_dict": foreign.weights()}
        try:
            model, loaded = loader.from_pretrained(
                attn_implementation=ATTENTION,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                **source,
                **({} if device_map is None else {"device_map": device_map}),
            )
        except Exception as error:  # the library raises whatever its parts do
            raise _refusal(name, error) from error
        adapter = cls(model.eval())
        adapter._check_direction(name)
        # What the files lack would be drawn at random. Tied weights that they leave out are not among these.
        lacking = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
        if lacking:
            raise ValueError(
                f"{name}: expected all weights of {type(model).__name__}, got {len(lacking)} of them missing or of "
                f"another shape: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
            )
        return adapter

    @staticmethod
    def checked_config(
        name: str, *, revision: str | None = None, gguf: str | None = None, foreign: Foreign | None = None
    ) -> Any:
        """The config of the model's text part, before weights are read. Raises ValueError as `load`."""
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise ValueError(
                "measuring a Hugging Face model needs the package transformers, got none; pip install -e .[hf]"
            ) from None
        if foreign is not None:
            return foreign.config
        _check_packages(gguf, None)
        return _check_config(name, _source(revision, gguf)).get_text_config()

    @staticmethod
    def tokenizer(name: str, *, revision: str | None = None, gguf: str | None = None) -> Any:
        """The model's own tokenizer. Raises ValueError where there is none with a backend of `tokenizers`."""
        import transformers

        source = _source(revision, gguf)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **source)
        except Exception as error:
            raise ValueError(f"{name}: expected a tokenizer beside the model, got: {_in_short(error)}") from error
        # What transformers makes of a folder without files.
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
            raise ValueError(
                f"{name}: expected a tokenizer beside the model, got none (no tokenizer.json); give one with "
                "--tokenizer"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{name}: got a tokenizer of type {type(tokenizer).__name__} without a tokenizer.json, expected one of "
                "the `tokenizers` library"
            )
        return tokenizer

    def _check_direction(self, name: str) -> None:
        """Refuse an encoder by what its layers say of themselves; `attend` refuses it by what they ask for."""
        try:
            blocks = self.blocks
        except ValueError:
            return
        ways = {getattr(module, "is_causal", None) for module in blocks.modules()}
        if False in ways and True not in ways:
            raise ValueError(
                f"{name}: got an encoder ({self.model.config.model_type}), whose attention sees both directions, "
                "expected a causal language model"
            )

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last. Raises ValueError where the model does not keep them in one list."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.config.n_layers]
        kinds = [m for m in lists if all(any("att" in name.lower() for name, _ in b.named_modules()) for b in m)]
        if len(kinds) != 1:
            raise ValueError(
                f"{type(self.model).__name__}: expected one list of {self.config.n_layers} layers with attention, "
                f"whose hidden states can be observed, got {len(kinds)}"
            )
        return kinds[0]

    @contextmanager
    def observed(self, attention: Attentions) -> Iterator[None]:
        """Hand each layer's attention to a callback; see `model.observe`."""
        before, self.observer = self.observer, attention
        try:
            yield
        finally:
            self.observer = before

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        *,
        next_tokens: Tensor | None = None,
        logits: bool = True,
        statistics: bool = False,
    ) -> DecoderOutput:
        """Logits [B, T, V], or the loss of each next token, and each layer's statistics (on the CPU); see
        `Decoder.forward`.

        Raises ValueError for attention that the operator cannot express.
        """
        mask = Mask(rows=len(tokens), length=tokens.shape[1]) if mask is None else mask
        current = Pass(mask, statistics, observer=self.observer)
        # Told that no token is padding, transformers does not look for documents in the positions: `mask` has them.
        given = {} if positions is None else {"position_ids": positions, "attention_mask": torch.ones_like(tokens)}
        logits = logits and next_tokens is None
        try:
            with asking(current):
                part = self.model if logits else self._body()
                output = part(input_ids=tokens, use_cache=False, **given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not current.sampled:
                raise
            raise ValueError(
                f"{type(self.model).__name__}: expected a model that hands its mask on to its attention as it is, "
                f"got a forward pass that fails on a sample of the mask's rows: {_in_short(error)}"
            ) from error
        if current.layers != self.config.n_layers:
            raise ValueError(
                f"{type(self.model).__name__}: got {current.layers} layers whose attention can be observed, expected "
                f"{self.config.n_layers}; the others are no softmax attention, or bypass transformers' interface for it"
            )
        nll = None
        if next_tokens is not None:
            nll = token_nll(partial(self._logits, output), output.last_hidden_state, next_tokens, self.vocab_size)
        seen = tuple(current.per_layer) if statistics else None
        return DecoderOutput(output.logits if logits else None, None, seen, nll)

    def _body(self) -> Any:
        """The model without its output matrix, which ModernBERT calls its decoder."""
        body = self.model.get_decoder()
        return self.model.base_model if body is self.model.get_output_embeddings() else body

    def _logits(self, output: Any, hidden: Tensor) -> Tensor:
        """Logits [n, V] of some of the decoder's last hidden states [n, C], made by the model itself, which may scale
        or cap them: it is called with a decoder that returns its `output` with these in it."""
        decoder = self._body()
        of_these = type(output)({**output, "last_hidden_state": hidden[None]})
        forward, decoder.forward = decoder.forward, lambda *args, **options: of_these
        try:
            no_tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            return self.model(input_ids=no_tokens, use_cache=False).logits[0]  # type: ignore[no-any-return]
        finally:
            decoder.forward = forward


def _source(revision: str | None, gguf: str | None) -> dict[str, str]:
    """What `from_pretrained` is told of where a model comes from, beside its name."""
    return {key: value for key, value in (("revision", revision), ("gguf_file", gguf)) if value is not None}


def _check_packages(gguf: str | None, device_map: object) -> None:
    """Refuse what needs a package that is not there."""
    for option, value, packages in (
        ("gguf", gguf, ("gguf", "accelerate")),
        ("device_map", device_map, ("accelerate",)),
    ):
        missing = [package for package in packages if value is not None and find_spec(package) is None]
        if missing:
            raise ValueError(
                f"{option}: needs the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}, got none; "
                "pip install -e .[hf]"
            )


def _check_config(name: str, source: dict[str, str]) -> Any:
    """Refuse, before weights are read, a model that its config says is not one of ours to measure."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
    except Exception as error:
        try:
            plain, _ = transformers.PreTrainedConfig.get_config_dict(name, **source)
            kind = plain.get("model_type")
        except Exception:
            raise _refusal(name, error) from error
        if kind is None or kind in transformers.CONFIG_MAPPING:
            raise _refusal(name, error) from error
        raise ValueError(
            f"{name}: got a config.json with model_type {kind!r}, which transformers {transformers.__version__} does "
            "not have"
            + (
                "; code that comes with a model is not run"
                if "auto_map" in plain
                else ", expected one of its causal language models; a newer release may have it"
            )
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name}: got an encoder with a decoder ({config.model_type}), expected a causal language model"
        )
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name}: got a model of type {config.model_type}, which transformers does not have as a causal language "
            "model, expected one that it has"
        )
    model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not model_class._supports_attention_backend:
        raise ValueError(
            f"{name}: expected a model whose layers call transformers' attention interface, as those of llama, gpt2 "
            f"and gemma do, got {model_class.__name__}, whose layers do not (no attention, as Mamba and RWKV, "
            "biases on the logits, as BLOOM and MPT, or attention of its own making); it cannot be measured"
        )
    if "gguf_file" in source:
        _check_gguf(name, source)
    return config


def _check_gguf(name: str, source: dict[str, str]) -> None:
    """Refuse a GGUF file whose rotary positions are scaled: `transformers` reads it as if they were not."""
    import gguf
    from transformers.utils import cached_file

    file = source["gguf_file"]
    reader = gguf.GGUFReader(str(cached_file(name, file, revision=source.get("revision"))))
    factors = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    kinds = [str(field.contents()) for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")]
    scaled = sorted({kind for kind in kinds if kind != "none"} | {t.name for t in factors if (t.data != 1).any()})
    if scaled:
        raise ValueError(
            f"{name}/{file}: got scaled rotary positions ({', '.join(scaled)}), which transformers does not read "
            "from GGUF; measure the same model from safetensors"
        )


def _refusal(name: str, error: Exception) -> ValueError:
    """One message for what `transformers` could not load."""
    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else ():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as damage:
            return ValueError(
                f"{path}: expected whole weights, got a file that is cut off or damaged ({damage}); copy it again"
            )
    kind = "folder" if Path(name).is_dir() else "name"
    return ValueError(
        f"{name}: expected the {kind} of a causal language model that transformers loads without code of its own, "
        f"found: {_in_short(error)}"
    )


def _in_short(error: Exception) -> str:
    """An error of a library, on one line."""
    return " ".join(str(error).split())[:300]
