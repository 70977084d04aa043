"""Our operator as the attention of `transformers`, which calls attention functions by name.

`attend` hands a layer's queries, keys and values to `kernels.attention`, which returns output and sink statistics
without the T×T matrix: what is kept of a layer is a few numbers a query. Masks come as intervals, from the caller and
from the layer's own sliding window. The mask that the model itself would build is evaluated for a sample of its
queries, to refuse a model whose layers see other keys.

Not expressible: biases added to the logits (ALiBi, T5, Doge), chunks and blocks that see both ways, heads whose values
have another width than their keys, and layers that are no attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sinkbed.kernels import Mask, Statistics, attention
from sinkbed.kernels.scoring import Scoring
from sinkbed.model.observe import Attentions, LayerAttention

ATTENTION = "sinkbed"
"""Name of our attention for `transformers`; see `register`."""
_SAMPLE = 64
"""Queries whose keys are compared with those that the model's own mask shows."""
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
)
"""Keywords of attention functions that change no output here: rotation happened before, nothing is cached."""


@dataclass
class Pass:
    """What one forward pass asks of every layer, and what it got."""

    mask: Mask
    statistics: bool
    windows: dict[tuple[int | None, torch.device], Mask] = field(default_factory=dict)
    per_layer: list[Statistics] = field(default_factory=list)
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


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextmanager
def asking(current: Pass) -> Iterator[None]:
    """Every layer that is called inside answers what `current` asks."""
    token = _PASS.set(current)
    try:
        yield
    finally:
        _PASS.reset(token)


def narrowed(mask: Mask, window: int) -> Mask:
    """The same mask where a query sees at most the last `window` keys, itself included, and its shared prefix."""
    index = torch.arange(mask.length, dtype=torch.int32, device=mask.device)
    first = (index - window + 1).clamp_min(0).expand(mask.rows, -1)
    if mask.first_key is not None:
        first = torch.maximum(first, mask.first_key)
    shared_prefix = 0 if mask.first_key is None else mask.shared_prefix
    return replace(mask, first_key=first, shared_prefix=shared_prefix)


def moved(mask: Mask, device: torch.device) -> Mask:
    """The same mask on another device; itself where it is there."""
    tensors = {name: getattr(mask, name) for name in ("first_key", "end_key", "doc_start")}
    there = {id(t): t.to(device) for t in tensors.values() if t is not None}  # one tensor under two names stays one
    if all(t is None or there[id(t)] is t for t in tensors.values()):
        return mask
    changed: dict[str, Any] = {name: None if t is None else there[id(t)] for name, t in tensors.items()}
    return replace(mask, **changed)


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
    current = _PASS.get()
    if current is not None and len(queries) < q_length:
        current.sampled = True

    def of_sample(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(batch, head, queries[query], key)

    # Left out where it is plain, the mask would be indistinguishable from that of a model which builds none.
    others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(batch_size, len(queries), kv_length, mask_function=of_sample, device=device, **others)
    assert mask is not None, "no mask is left out"
    return mask


def _check_own_mask(name: str, own: Tensor, length: int, window: int | None) -> None:
    """Refuse a layer whose own mask is not causal, with the window that it tells of."""
    queries = sampled_queries(length, own.device)[:, None]
    expected = [1, len(queries), length]
    if own.dtype != torch.bool or list(own.shape[1:]) != expected:
        raise ValueError(
            f"{name}: got attention_mask of {own.dtype} and shape {list(own.shape)}, expected the one that "
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
            f"{name}: got a mask whose query {query} of {length} sees other keys than expected, {seen}; chunks, "
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
    current = _PASS.get()
    assert current is not None, "called outside of HFModel"
    name = type(module).__name__
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{name}: got attention in both directions, expected a causal language model")
    if value.shape[-1] != key.shape[-1] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name}: got queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}, "
            "expected one length and one head dim"
        )
    if dropout:
        raise ValueError(f"{name}: expected a model in evaluation mode, got dropout of {dropout}; call eval()")
    unknown = sorted(key for key, given in others.items() if given is not None and key not in _HARMLESS)
    if unknown:
        raise ValueError(
            f"{name}: got attention with {', '.join(unknown)}, expected none but a scale, a window, a soft cap or a "
            "sink logit"
        )
    if attention_mask is not None:
        _check_own_mask(name, attention_mask, query.shape[2], sliding_window)
    mask = current.within(sliding_window, query.device)
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention(
        query, key, value, mask, scale=scale, softcap=softcap, sink_logit=s_aux, statistics=current.statistics
    )
    if current.observer is not None:
        scoring = Scoring(scale=scale, softcap=softcap)
        current.observer(LayerAttention(current.layers, query, key, value, out.lse, mask, scoring, out.statistics))
    current.layers += 1
    if out.statistics is not None:
        current.per_layer.append(Statistics(*(None if s is None else s.cpu() for s in out.statistics)))  # type: ignore[arg-type]
    return out.output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Have `transformers` know our attention by its name. A model made with it is run through `HFModel` alone."""
    import transformers

    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.AttentionMaskInterface.register(ATTENTION, sampled_mask)
