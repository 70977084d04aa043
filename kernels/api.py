"""The one public operator: validates, chooses an implementation, returns output, lse and statistics.

Shapes: B rows, H query heads, Hkv key/value heads (H a multiple of Hkv), T positions, D head dim.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels.mask import Mask
from kernels.reference import reference_attention
from kernels.torch_cpu import torch_attention

Implementation = Literal["reference", "torch", "triton"]
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"reference": reference_attention, "torch": torch_attention}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
if importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or _INTERPRETED):
    from kernels.triton_gpu import triton_attention

    _IMPLEMENTATIONS["triton"] = triton_attention
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Statistics(NamedTuple):
    """What a forward pass learns of the sink, without the T×T matrix. All [B, H, T], without gradient."""

    row_mass: Tensor
    """Attention mass on the key at row position 0; exactly 0 where the mask hides it."""
    document_mass: Tensor
    """Attention mass on the first key of the query's document (1 for a document's first query, by
    construction); exactly 0 where the mask hides it."""
    sink_mass: Tensor | None
    """Attention mass on the learned sink logit; None without one."""


class AttentionOutput(NamedTuple):
    """What `attention` returns."""

    output: Tensor
    """[B, H, T, D], dtype of q."""
    lse: Tensor
    """[B, H, T], log-sum-exp of the logits in natural log, the learned sink included; differentiable."""
    statistics: Statistics | None
    """None unless asked for."""


def available(device: torch.device | str) -> tuple[Implementation, ...]:
    """Implementations that run on `device`, the preferred one first."""
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
    sink_logit: Tensor | None = None,
    statistics: bool = False,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """softmax(scale · q kᵀ + mask) v over packed rows, with the statistics of the attention sink.

    Args:
        q: [B, H, T, D]; k, v: [B, Hkv, T, D]; any strides.
        mask: which keys a query sees; None is causal.
        scale: factor of the logits, more than 0; None is 1/√D.
        sink_logit: [H], a learned logit per head that joins the softmax but has no value
            (arXiv 2508.10925); 0 gives softmax-off-by-one.
        statistics: also return the masses on the first key of the row and of the document.
        implementation: None takes the first of `available(q.device)`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an implementation that does not run
            on this device. Nothing falls back silently.
    """
    _validate(q, k, v, sink_logit)
    B, _, T, D = q.shape
    if mask is None:
        mask = Mask(rows=B, length=T)
    if (mask.rows, mask.length) != (B, T):
        raise ValueError(f"mask: expected B={B}, T={T} as in q, received B={mask.rows}, T={mask.length}")
    usable = available(q.device)
    chosen = usable[0] if implementation is None else implementation
    if chosen not in usable:
        known = "" if chosen in get_args(Implementation) else f" (known: {', '.join(get_args(Implementation))})"
        raise ValueError(
            f"implementation: expected one of {', '.join(usable)} on {q.device.type}, received {chosen!r}{known}"
        )
    scale = D**-0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale: expected more than 0, received {scale}")
    output, lse, found = _IMPLEMENTATIONS[chosen](q, k, v, mask, scale, sink_logit, statistics)
    return AttentionOutput(output, lse, None if found is None else Statistics(*found))


def _validate(q: Tensor, k: Tensor, v: Tensor, sink_logit: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected [B, H, T, D], received shape {list(x.shape)}")
        if x.dtype not in _DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: expected a float dtype and device as q's ({q.dtype}, {q.device}), "
                f"received {x.dtype}, {x.device}"
            )
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty dimension, received shape {list(x.shape)}")
    B, H, T, D = q.shape
    Hkv = k.shape[1]
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != (B, Hkv, T, D):
            raise ValueError(f"{name}: expected [B={B}, Hkv={Hkv}, T={T}, D={D}] as q and k, received {list(x.shape)}")
    if H % Hkv:
        raise ValueError(f"k: expected a number of heads that divides q's {H}, received {Hkv}")
    if sink_logit is not None and (tuple(sink_logit.shape) != (H,) or sink_logit.device != q.device):
        raise ValueError(
            f"sink_logit: expected shape [H={H}] on {q.device}, "
            f"received {list(sink_logit.shape)} on {sink_logit.device}"
        )
