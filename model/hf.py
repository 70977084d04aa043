"""Causal language models of `transformers` under our attention operator, so that one code measures them and ours.

`transformers` calls an attention function by name. Ours hands the layer's queries, keys and values to
`kernels.attention`, which returns output and sink statistics without the T×T matrix: what is kept of a layer is a few
numbers a query. Masks come as intervals, from the caller and from the layer's own sliding window. The mask that the
model itself would build is evaluated for a sample of its queries, to refuse a model whose layers see other keys.

Not expressible: biases added to the logits (ALiBi, T5, Doge), chunks and blocks that see both ways, heads whose values
have another width than their keys, and layers that are no attention. No code that comes with a model is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels import Mask, Statistics, attention
from kernels.statistics import blocks_of
from model.decoder import DecoderOutput
from model.observe import Attentions, LayerAttention

ATTENTION = "sinkbed"
"""Name of our attention for `transformers`; see `register`."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SAMPLE = 64
"""Queries whose keys are compared with those that the model's own mask shows."""
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
)
"""Keywords of attention functions that change no output here: rotation happened before, nothing is cached."""


@dataclass
class _Pass:
    """What one forward pass asks of every layer, and what it got."""

    mask: Mask
    statistics: bool
    windows: dict[tuple[int | None, torch.device], Mask] = field(default_factory=dict)
    found: list[Statistics] = field(default_factory=list)
    layers: int = 0
    observer: Attentions | None = None
    sampled: bool = False
    """Whether the model was given masks of fewer rows than there are queries."""

    def within(self, window: int | None, device: torch.device) -> Mask:
        """The mask, narrowed to the last `window` keys of each query, on the layer's device."""
        if window is not None and window >= self.mask.length:
            window = None
        if (window, device) not in self.windows:
            mask = self.mask if window is None else narrowed(self.mask, window)
            self.windows[window, device] = moved(mask, device)
        return self.windows[window, device]


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def narrowed(mask: Mask, window: int) -> Mask:
    """The same mask where a query sees at most the last `window` keys, itself included."""
    device = mask.first_key.device if mask.first_key is not None else None
    if device is None and mask.doc_start is not None:
        device = mask.doc_start.device
    index = torch.arange(mask.length, dtype=torch.int32, device=device)
    first = (index - window + 1).clamp_min(0).expand(mask.rows, -1)
    if mask.first_key is not None:
        first = torch.maximum(first, mask.first_key)
    return Mask(
        rows=mask.rows,
        length=mask.length,
        first_key=first.contiguous(),
        end_key=mask.end_key,
        shared_prefix=mask.shared_prefix if mask.first_key is not None else 0,
        shared_from=mask.shared_from,
        doc_start=mask.doc_start,
    )


def moved(mask: Mask, device: torch.device) -> Mask:
    """The same mask on another device; itself where it is there."""
    tensors = {name: getattr(mask, name) for name in ("first_key", "end_key", "doc_start")}
    there: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if tensor is not None:
            there.setdefault(id(tensor), tensor.to(device))  # one tensor under two names stays one
    if all(tensor is None or there[id(tensor)] is tensor for tensor in tensors.values()):
        return mask
    changed: dict[str, Any] = {name: None if t is None else there[id(t)] for name, t in tensors.items()}
    return replace(mask, **changed, _bias={}, _ends={})


def sampled_queries(length: int, device: torch.device | str | None = None) -> Tensor:
    """At most 64 of the positions 0..T−1, evenly spaced, the first and the last among them: [S] int64."""
    count = min(length, _SAMPLE)
    return torch.arange(count, device=device) * (length - 1) // max(count - 1, 1)


def sampled_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor:
    """The mask function that `transformers` calls: rows of the model's own mask, [B, 1, S, T] bool, True where visible.

    The rows are those of `sampled_queries`, so that memory is 64 · T at any length.
    """
    from transformers.masking_utils import sdpa_mask

    queries = sampled_queries(q_length, device) + q_offset
    asked = _PASS.get()
    if asked is not None and len(queries) < q_length:
        asked.sampled = True

    def of_sample(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(batch, head, queries[query], key)

    # Left out where it is plain, the mask would be indistinguishable from that of a model which builds none.
    others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    found = sdpa_mask(batch_size, len(queries), kv_length, mask_function=of_sample, device=device, **others)
    assert found is not None, "no mask is left out"
    return found


def _check_own_mask(name: str, own: Tensor, length: int, window: int | None) -> None:
    """Refuse a layer whose own mask is not causal, with the window that it tells of."""
    queries = sampled_queries(length, own.device)[:, None]
    expected = [1, len(queries), length]
    if own.dtype != torch.bool or list(own.shape[1:]) != expected:
        raise ValueError(
            f"{name}: found attention_mask of {own.dtype} and shape {list(own.shape)}, expected the one that "
            f"transformers makes for us, torch.bool of shape [B, {', '.join(map(str, expected))}]; a bias on the "
            "logits and a mask of the model's own making are not supported"
        )
    keys = torch.arange(length, device=own.device)
    plain = keys <= queries
    if window is not None:
        plain &= keys > queries - window
    differing = (own != plain).any(-1).any(0)[0]
    if differing.any():
        query = int(queries[differing][0])
        seen = "all keys up to its own" if window is None else f"the last {window} keys"
        raise ValueError(
            f"{name}: found a mask whose query {query} of {length} sees other keys than expected, {seen}; chunks, "
            "blocks that see both ways, and windows that are told to the mask alone are not supported (a length within "
            "the first chunk or window may be)"
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` calls: query [B, H, T, D], key, value [B, Hkv, T, D] -> [B, T, H, D].

    Raises ValueError for an attention that the operator cannot express.
    """
    asked = _PASS.get()
    assert asked is not None, "called outside of HFModel"
    name = type(module).__name__
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{name}: found attention in both directions, expected a causal language model")
    if value.shape[-1] != key.shape[-1] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name}: found queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}, "
            "expected one length and one head dim"
        )
    unknown = sorted(key for key, given in others.items() if given is not None and key not in _HARMLESS)
    if unknown:
        raise ValueError(
            f"{name}: found attention with {', '.join(unknown)}, expected none but a scale, a window, a soft cap or a "
            "sink logit"
        )
    if attention_mask is not None:
        _check_own_mask(name, attention_mask, query.shape[2], sliding_window)
    mask = asked.within(sliding_window, query.device)
    query, key = query.to(value.dtype), key.to(value.dtype)
    found: Statistics | None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        out = attention(query, key, value, mask, scale=scale, sink_logit=s_aux, statistics=asked.statistics)
        output, lse, found = out.output, out.lse, out.statistics
    else:
        if s_aux is not None:
            raise ValueError(f"{name}: found a soft cap and a sink logit, which together are not supported")
        output, lse, found = _softcapped(query, key, value, mask, scale, softcap)
    if asked.observer is not None:
        asked.observer(LayerAttention(asked.layers, query, key, value, lse, mask, scale, softcap, found))
    asked.layers += 1
    if found is not None and asked.statistics:
        asked.found.append(Statistics(*(None if s is None else s.cpu() for s in found)))  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Have `transformers` know our attention by its name. A model made with it is run through `HFModel` alone."""
    import transformers

    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.AttentionMaskInterface.register(ATTENTION, sampled_mask)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, cap: float
) -> tuple[Tensor, Tensor, Statistics]:
    """Output, lse and statistics of attention with cap · tanh(logits / cap) (Gemma 2, arXiv 2408.00118).

    The operator has no such logits; in blocks of queries, memory is a block times T.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    H, shape = query.shape[1], query.shape[:3]
    outputs, normalisers = [], []
    row, document = query.new_zeros(shape, dtype=torch.float32), query.new_zeros(shape, dtype=torch.float32)
    start = mask.doc_start
    for block in blocks_of(query.shape[2]):
        logits = (query[:, :, block] @ key.transpose(2, 3)).float() * scale
        logits = (cap * torch.tanh(logits / cap)).masked_fill(~mask.visible(query.device, block), float("-inf"))
        normalisers.append(logits.logsumexp(-1))
        probabilities = (logits - normalisers[-1][..., None]).exp()
        outputs.append(probabilities.to(value.dtype) @ value)
        probabilities = probabilities.detach()
        row[:, :, block] = probabilities[..., 0]
        first = None if start is None else start[:, None, block, None].long().expand(-1, H, -1, 1)
        document[:, :, block] = probabilities[..., 0] if first is None else probabilities.gather(-1, first)[..., 0]
    return torch.cat(outputs, 2), torch.cat(normalisers, 2), Statistics(row, document, None)


@dataclass(frozen=True)
class Shape:
    """What measuring needs to know of a model."""

    layers: int
    heads: int


class HFModel(nn.Module):
    """A causal language model of `transformers` that is called as our decoder is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.observer: Attentions | None = None
        text = model.config.get_text_config()
        self.config = Shape(int(text.num_hidden_layers), int(text.num_attention_heads))

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        gguf: str | None = None,
        dtype: str = "auto",
        device_map: str | dict[str, int | str] | None = None,
    ) -> HFModel:
        """Load a model folder, or a model of the hub by name.

        Args:
            gguf: file in that folder or repository, for weights in GGUF (needs `gguf` and `accelerate`).
            dtype: as in `transformers`: `auto`, `float32`, `bfloat16`, ...
            device_map: as in `transformers`: `auto`, or module -> device (`cpu`, `disk`, a GPU's number); layers over
                several devices, or fetched from disk as they are needed (needs `accelerate`).

        Raises ValueError for what is no causal language model, whose attention cannot be observed, or whose files
        are damaged or lack weights, and for a package that is missing.
        """
        try:
            import transformers
        except ImportError:
            raise ValueError(
                "measuring a Hugging Face model needs the package transformers, found none; pip install -e .[hf]"
            ) from None
        _check_packages(gguf, device_map)
        register()
        source = {key: value for key, value in (("revision", revision), ("gguf_file", gguf)) if value is not None}
        _check_config(name, source)
        loader: Any = transformers.AutoModelForCausalLM
        try:
            model, loaded = loader.from_pretrained(
                name,
                attn_implementation=ATTENTION,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                **source,
                **({} if device_map is None else {"device_map": device_map}),
            )
        except Exception as error:  # the library raises whatever its parts do
            raise _refusal(name, error) from error
        found = cls(model.eval())
        found._check_direction(name)
        # What the files lack would be drawn at random. Tied weights that they leave out are not among these.
        lacking = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
        if lacking:
            raise ValueError(
                f"{name}: expected all weights of {type(model).__name__}, found {len(lacking)} of them missing or of "
                f"another shape: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
            )
        return found

    @staticmethod
    def tokenizer(name: str, *, revision: str | None = None, gguf: str | None = None) -> Any:
        """The model's own tokenizer. Raises ValueError where there is none with a backend of `tokenizers`."""
        import transformers

        options = {"revision": revision, "gguf_file": gguf}
        given = {key: value for key, value in options.items() if value is not None}
        try:
            found = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **given)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{name}: expected a tokenizer beside the model, found: {reason}") from error
        if len(found.get_vocab()) <= len(found.all_special_ids):  # what transformers makes of a folder without files
            raise ValueError(f"{name}: expected a tokenizer beside the model, found none (no tokenizer.json)")
        if not getattr(found, "is_fast", False):
            raise ValueError(
                f"{name}: found a tokenizer of type {type(found).__name__} without a tokenizer.json, expected one of "
                "the `tokenizers` library"
            )
        return found

    def _check_direction(self, name: str) -> None:
        """Refuse an encoder by what its layers say of themselves; `attend` refuses it by what they ask for."""
        try:
            blocks = self.blocks
        except ValueError:
            return
        ways = {getattr(module, "is_causal", None) for module in blocks.modules()}
        if False in ways and True not in ways:
            raise ValueError(
                f"{name}: found an encoder ({self.model.config.model_type}), whose attention sees both directions, "
                "expected a causal language model"
            )

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last. Raises ValueError where the model does not keep them in one list."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.config.layers]
        kinds = [m for m in lists if all(any("att" in name.lower() for name, _ in b.named_modules()) for b in m)]
        if len(kinds) != 1:
            raise ValueError(
                f"{type(self.model).__name__}: expected one list of {self.config.layers} layers with attention, whose "
                f"hidden states can be observed, found {len(kinds)}"
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
        statistics: bool = False,
    ) -> DecoderOutput:
        """Logits [B, T, V] and each layer's statistics (on the CPU); see `Decoder.forward`.

        Raises ValueError for attention that the operator cannot express.
        """
        mask = Mask(rows=len(tokens), length=tokens.shape[1]) if mask is None else mask
        asked = _Pass(mask, statistics, observer=self.observer)
        # Told that no token is padding, transformers does not look for documents in the positions: `mask` has them.
        given = {} if positions is None else {"position_ids": positions, "attention_mask": torch.ones_like(tokens)}
        try:
            with _set(asked):
                logits = self.model(input_ids=tokens, use_cache=False, **given).logits
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not asked.sampled:
                raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{type(self.model).__name__}: expected a model that hands its mask on to its attention as it is, "
                f"found a forward pass that fails on a sample of the mask's rows: {reason}"
            ) from error
        if asked.layers != self.config.layers:
            raise ValueError(
                f"{type(self.model).__name__}: found {asked.layers} layers whose attention can be observed, expected "
                f"{self.config.layers}; the others are no softmax attention, or bypass transformers' interface for it"
            )
        return DecoderOutput(logits, None, tuple(asked.found) if statistics else None)


def _check_packages(gguf: str | None, device_map: object) -> None:
    """Refuse what needs a package that is not there."""
    needed: dict[str, tuple[str, ...]] = {"gguf": ("gguf", "accelerate")} if gguf is not None else {}
    if device_map is not None:
        needed["device_map"] = ("accelerate",)
    for option, packages in needed.items():
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            raise ValueError(
                f"{option}: needs the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}, found none; "
                "pip install -e .[hf]"
            )


def _check_config(name: str, source: dict[str, str]) -> None:
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
            f"{name}: found a config.json with model_type {kind!r}, which transformers {transformers.__version__} does "
            "not have"
            + (
                "; code that comes with a model is not run"
                if "auto_map" in plain
                else ", expected one of its causal language models; a newer release may have it"
            )
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name}: found an encoder with a decoder ({config.model_type}), expected a causal language model"
        )
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name}: found a model of type {config.model_type}, which transformers does not have as a causal language "
            "model, expected one that it has"
        )
    if "gguf_file" in source:
        _check_gguf(name, source)


def _check_gguf(name: str, source: dict[str, str]) -> None:
    """Refuse a GGUF file whose rotary positions are scaled: `transformers` reads it as if they were not."""
    import gguf
    from transformers.utils import cached_file

    file = source["gguf_file"]
    reader = gguf.GGUFReader(str(cached_file(name, file, revision=source.get("revision"))))
    factors = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    kinds = [str(found.contents()) for key, found in reader.fields.items() if key.endswith(".rope.scaling.type")]
    scaled = sorted({kind for kind in kinds if kind != "none"} | {t.name for t in factors if (t.data != 1).any()})
    if scaled:
        raise ValueError(
            f"{name}/{file}: found scaled rotary positions ({', '.join(scaled)}), which transformers does not read "
            "from GGUF; measure the same model from safetensors"
        )


def _refusal(name: str, error: Exception) -> ValueError:
    """One message for what `transformers` could not load."""
    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else ():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as found:
            return ValueError(
                f"{path}: expected whole weights, found a file that is cut off or damaged ({found}); copy it again"
            )
    reason = " ".join(str(error).split())[:300]
    kind = "folder" if Path(name).is_dir() else "name"
    return ValueError(
        f"{name}: expected the {kind} of a causal language model that transformers loads without code of its own, "
        f"found: {reason}"
    )


@contextmanager
def _set(asked: _Pass) -> Iterator[None]:
    token = _PASS.set(asked)
    try:
        yield
    finally:
        _PASS.reset(token)


def special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Ids below `size` that no text contains: control tokens, the reserved ones too, and ids without a token."""
    # Some vocabularies list the single bytes that text falls back to as special tokens.
    added = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and not _BYTE.fullmatch(token.content)
    }
    ordinary = set(tokenizer.get_vocab().values()) - added - set(tokenizer.all_special_ids)
    return frozenset(range(size)) - ordinary


def token_bytes(tokenizer: Any, size: int) -> list[int]:
    """UTF-8 bytes of text that each id stands for, [size]; 0 for control tokens and ids without a token.

    Of other kinds of tokenizer the figures are wrong; whoever uses them checks them on text (`train.probe`).

    Args:
        tokenizer: of `transformers`, with a backend of the `tokenizers` library: byte-level, or with ▁ for a space and
            <0x0A> for single bytes (SentencePiece).
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    byte_level = "ByteLevel" in json.dumps(decoder)
    added = tokenizer.get_added_vocab()
    special = special_ids(tokenizer, size)
    table = [0] * size
    for token, index in tokenizer.get_vocab().items():
        if index >= size or index in special:
            continue
        if not byte_level and _BYTE.fullmatch(token):
            table[index] = 1
        elif token in added:
            table[index] = len(token.encode())
        elif byte_level:
            table[index] = len(token)  # each character stands for one byte
        else:
            table[index] = len(token.replace("▁", " ").encode())
    return table
