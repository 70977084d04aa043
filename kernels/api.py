"""The one public operator: validates, chooses an implementation, returns output, lse and statistics.

Shapes: B rows, H query heads, Hkv key/value heads (H a multiple of Hkv), T positions, D head dim.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sinkbed.kernels.cpu import torch_attention
from sinkbed.kernels.derivatives import refuse_forward_mode
from sinkbed.kernels.mask import Mask
from sinkbed.kernels.normalizers import Normalizer
from sinkbed.kernels.reference import reference_attention, reference_received
from sinkbed.kernels.scoring import Scoring
from sinkbed.kernels.statistics import Statistics, received_in_blocks

Implementation = Literal["reference", "torch", "triton"]


class _Functions(NamedTuple):
    attention: Callable[..., Any]
    received: Callable[..., Tensor]


_IMPLEMENTATIONS = {
    "reference": _Functions(reference_attention, reference_received),
    "torch": _Functions(torch_attention, received_in_blocks),
}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
if importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or _INTERPRETED):
    from sinkbed.kernels.triton.op import triton_attention, triton_received

    _IMPLEMENTATIONS["triton"] = _Functions(triton_attention, triton_received)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class AttentionOutput(NamedTuple):
    """What `attention` returns."""

    output: Tensor
    """[B, H, T, D], dtype of q."""
    lse: Tensor | None
    """[B, H, T], log-sum-exp of the logits in natural log, the learned sink included; differentiable. None with a
    normaliser."""
    statistics: Statistics | None
    """None unless asked for."""


def available(device: torch.device | str) -> tuple[Implementation, ...]:
    """Implementations that run on `device`, the preferred one first; `reference` is never taken unless asked for."""
    kind = torch.device(device).type
    if kind == "cpu":
        # In Triton's interpreter the kernels run on CPU tensors: for tests, never by themselves.
        interpreted: tuple[Implementation, ...] = ("triton",) if _INTERPRETED and "triton" in _IMPLEMENTATIONS else ()
        return ("torch", "reference", *interpreted)
    return ("triton", "reference") if kind == "cuda" and "triton" in _IMPLEMENTATIONS else ("reference",)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sink_logit: Tensor | None = None,
    sink_value: Tensor | None = None,
    normalizer: Normalizer | None = None,
    statistics: bool = False,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """softmax(scale · q kᵀ + mask) v over packed rows, with the statistics of the attention sink.

    Args:
        q: [B, H, T, D]; k, v: [B, Hkv, T, D]; any strides.
        mask: which keys a query sees; None is causal.
        scale: factor of the logits, more than 0; None is 1/√D.
        softcap, slopes: see `kernels.scoring.Scoring`.
        sink_logit: [H], a learned logit per head that joins the softmax (arXiv 2508.10925); 0 gives
            softmax-off-by-one. [B, H, T]: a logit per query, as that of a key which is no token's.
        sink_value: [H, D], the value of that logit; None has none.
        normalizer: what takes the softmax's place (see `kernels.normalizers`), without a learned sink.
        statistics: also return the masses on the first key of the row, of the document and on the learned sink, and
            with a normaliser or a sink_logit the sum of the weights of tokens.
        implementation: None takes the device's own: `torch` on CPUs, `triton` on CUDA and ROCm. Other devices have
            none: `reference`, which holds the T×T matrix, must be asked for.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an implementation that does not run
            on this device. Nothing falls back silently.
        RuntimeError: for a gradient of the gradients and for forward-mode derivatives, which `reference` alone has.
    """
    _validate(q, k, v)
    scoring = Scoring(
        scale=_checked_scale(scale, q),
        softcap=softcap,
        slopes=slopes,
        normalizer=normalizer,
        sink_logit=sink_logit,
        sink_value=sink_value,
    )
    _validate_scoring(scoring, q)
    mask = _fitting(mask, q)
    functions = _choose(implementation, q.device)
    if functions.attention is not reference_attention:
        refuse_forward_mode(q, k, v, slopes, sink_logit, sink_value)
    out = AttentionOutput(*functions.attention(q, k, v, mask, scoring, statistics))
    if out.statistics is None or sink_logit is None or out.lse is None or out.statistics.row_sum is not None:
        return out
    with torch.no_grad():  # 1 − the sink's mass would be lost where that is nearly all
        of_tokens = replace(scoring, sink_logit=None, sink_value=None)
        _, lse_of_tokens, _ = functions.attention(q, k, v, mask, of_tokens, False)
        row_sum = (lse_of_tokens - out.lse).exp()
    return out._replace(statistics=out.statistics._replace(row_sum=row_sum))


def attention_received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """Attention that each key receives: the column sums Σ_i p(i, j), in a pass of its own after the forward pass.

    They add up to T less the mass on the learned sink. `mean_received` divides by the queries that see the key,
    `top_sinks` picks the strongest.

    Args:
        q: [B, H, T, D]; k: [B, Hkv, T, D], as given to `attention`, with the same mask and scale.
        lse: [B, H, T], what `attention` returned, of a softmax without softcap and slopes.

    Returns:
        [B, H, T] in the dtype of lse; without gradient. A rerun is bitwise equal.

    Raises:
        ValueError: as `attention`, and for an lse of another shape, device or kind of number.
    """
    _validate(q, k, k)
    mask = _fitting(mask, q)
    if lse is None:
        raise ValueError("lse: expected that of a softmax, got None, which a normaliser leaves")
    if lse.shape != q.shape[:3] or lse.device != q.device or lse.dtype not in _DTYPES:
        raise ValueError(
            f"lse: expected a float dtype and shape {list(q.shape[:3])} on {q.device}, "
            f"got {lse.dtype}, {list(lse.shape)} on {lse.device}"
        )
    functions, scale = _choose(implementation, q.device), _checked_scale(scale, q)
    with torch.no_grad():
        return functions.received(q, k, lse, mask, scale)


def _fitting(mask: Mask | None, q: Tensor) -> Mask:
    B, _, T, _ = q.shape
    mask = Mask(rows=B, length=T) if mask is None else mask
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: expected what interval_mask makes, or None for causal, got a {type(mask).__name__}")
    if (mask.rows, mask.length) != (B, T):
        raise ValueError(f"mask: expected B={B}, T={T} as in q, got B={mask.rows}, T={mask.length}")
    for tensor in (mask.first_key, mask.end_key, mask.doc_start):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"mask: expected its tensors on {q.device} as q, got {tensor.device}")
    return mask


def _choose(implementation: Implementation | None, device: torch.device) -> _Functions:
    usable = available(device)
    chosen = usable[0] if implementation is None else implementation
    if implementation is None and chosen == "reference":
        missing = "the package triton, got none" if device.type == "cuda" else f"q on a CPU or CUDA, got {device}"
        raise ValueError(
            f"implementation: expected {missing}; implementation='reference' runs on any device, with the T×T matrix"
        )
    if chosen not in usable:
        known = "" if chosen in get_args(Implementation) else f" (known: {', '.join(get_args(Implementation))})"
        raise ValueError(f"implementation: expected one of {', '.join(usable)} on {device.type}, got {chosen!r}{known}")
    return _IMPLEMENTATIONS[chosen]


def _checked_scale(scale: float | None, q: Tensor) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number above 0, got {scale}")
    return scale


def _validate(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected [B, H, T, D], got shape {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: expected the dtype and device of q ({q.dtype}, {q.device}), got {x.dtype}, {x.device}"
            )
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty dimension, got shape {list(x.shape)}")
    B, H, T, D = q.shape
    Hkv = k.shape[1]
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != (B, Hkv, T, D):
            raise ValueError(f"{name}: expected [B={B}, Hkv={Hkv}, T={T}, D={D}] as q and k, got {list(x.shape)}")
    if H % Hkv:
        raise ValueError(f"k: expected a number of heads that divides q's {H}, got {Hkv}")


def _validate_scoring(scoring: Scoring, q: Tensor) -> None:
    B, H, T, D = q.shape
    softcap, slopes, sink_logit, sink_value = scoring.softcap, scoring.slopes, scoring.sink_logit, scoring.sink_value
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number above 0, got {softcap}")
    if sink_logit is not None:
        _check_tensor("sink_logit", sink_logit, q, {f"[H={H}]": (H,), f"[B={B}, H={H}, T={T}]": (B, H, T)})
    if slopes is not None:
        _check_tensor("slopes", slopes, q, {f"[H={H}]": (H,)})
        if slopes.requires_grad:
            raise ValueError("slopes: expected a tensor without a gradient, which none is computed for, got one with")
    if sink_value is not None:
        _check_tensor("sink_value", sink_value, q, {f"[H={H}, D={D}]": (H, D)})
        if sink_logit is None:
            raise ValueError("sink_value: expected a sink_logit with it, got none")
    if not isinstance(scoring.normalizer, Normalizer | None):
        raise ValueError(
            "normalizer: expected a module of sinkbed.kernels.normalizers, such as NORMALIZERS.make('sigmoid', heads), "
            f"got {scoring.normalizer!r}"
        )
    if scoring.normalizer is not None and sink_logit is not None:
        raise ValueError(
            f"normalizer {type(scoring.normalizer).__name__}: expected no sink_logit beside it, which joins a softmax, "
            "got one"
        )


def _check_tensor(name: str, x: Tensor, q: Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor of shape {' or '.join(shapes)}, got a {type(x).__name__}")
    if tuple(x.shape) not in shapes.values() or x.device != q.device or x.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: expected a float dtype and shape {' or '.join(shapes)} on {q.device}, got {x.dtype}, "
            f"{list(x.shape)} on {x.device}"
        )
