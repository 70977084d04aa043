"""Attention by the Triton kernels, as a `torch.library` operator: launch, autograd and fake implementations.

With TRITON_INTERPRET=1 (set before triton is imported) the same kernels run on CPU tensors, slowly: the tests do so.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from sinkbed.kernels.derivatives import refuse_forward_mode, refuse_second_backward
from sinkbed.kernels.mask import Mask
from sinkbed.kernels.normalizers import Fused
from sinkbed.kernels.scoring import Scoring, per_query
from sinkbed.kernels.statistics import Statistics, with_key
from sinkbed.kernels.triton import kernels as triton_kernels
from sinkbed.kernels.triton.order import section
from sinkbed.kernels.triton.tiles import HEAD_DIMS, Tiles, tiles

_WIDEST = 2**31 // 128
"""Stride of T below which offsets inside a tile of at most 128 positions fit 32 bits."""
_Result = TypeVar("_Result")


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def _architecture() -> str | None:
    """Of the device that a launch goes to: `sm_90`, `gfx942`; None in the interpreter."""
    if interpreted():
        return None
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


# The last four of a normaliser, as `Fused` has them; "softmax" is none.
_SCORING = "float scale, float? softcap, str normalizer, bool normalized, float? bias, float eps"
torch.library.define(
    "sinkbed::attention_triton",
    "(Tensor q, Tensor k, Tensor v, Tensor? first_key, Tensor? end_key, Tensor? first_query, Tensor? last_query, "
    "Tensor? doc_start, Tensor? doc_end, Tensor? sink_logit, Tensor? slopes, int shared_from, int shared_to, "
    f"{_SCORING}, bool statistics) -> (Tensor output, Tensor lse, Tensor first_key_mass, Tensor document_mass, "
    "Tensor learned_sink_mass, Tensor row_sum)",
)
torch.library.define(
    "sinkbed::attention_triton_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, Tensor? first_key, "
    "Tensor? end_key, Tensor? first_query, Tensor? last_query, Tensor? sink_logit, Tensor? slopes, int shared_from, "
    f"int shared_to, {_SCORING}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sinkbed::attention_received_triton",
    "(Tensor q, Tensor k, Tensor lse, Tensor? first_query, Tensor? last_query, int shared_from, int shared_to, "
    "float scale) -> Tensor",
)


def _on_its_device(launch: Callable[..., _Result]) -> Callable[..., _Result]:
    """Run `launch` on the device of its first argument: Triton launches on the current one, whatever the tensors'."""

    @functools.wraps(launch)
    def call(first: Tensor, *rest: Any) -> _Result:
        with torch.cuda.device(first.device) if first.device.type == "cuda" else nullcontext():
            return launch(first, *rest)

    return call


def _meta(q: Tensor) -> dict[str, Any]:
    D = q.shape[-1]
    block_d = triton.next_power_of_2(D)
    # Three TF32 products keep float32 accuracy on NVIDIA's matrix units; AMD's have float32 itself.
    nvidia = (_architecture() or "").startswith("sm_")
    return {"BLOCK_D": block_d, "EVEN_D": block_d == D, "PRECISION": "tf32x3" if nvidia else "ieee"}


def _wgmma() -> bool:
    """Whether the forward and dQ kernels take the form for sm_90, whose products are of four warps: sums in parts, and
    masked tiles that are said to be there. In the interpreter too, for its tests."""
    return _architecture() in ("sm_90", None)


def _tiles(kernel: str, q: Tensor) -> Tiles:
    return tiles(_architecture(), kernel, q.dtype.itemsize, triton.next_power_of_2(q.shape[-1]))


def _head_bytes(x: Tensor) -> int:
    return x.shape[2] * x.shape[3] * x.itemsize


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:3])


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T, D] tensors as the kernels read them: D contiguous, offsets inside a tile in 32 bits."""
    return tuple(x if x.stride(-1) == 1 and x.stride(2) < _WIDEST else x.contiguous() for x in tensors)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _empty_like(x: Tensor) -> Tensor:
    """Unwritten memory laid out as x [B, H, T, D], or contiguous where D would not be."""
    copy = torch.empty_like(x)
    return copy if copy.stride(-1) == 1 else x.new_empty(x.shape)


def _outputs(q: Tensor, statistics: bool, sink: bool, normalizer: str) -> tuple[Tensor, ...]:
    """Output, lse, and four statistics, empty where there are none or they are not asked for."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    wanted = (statistics, statistics, statistics and sink, statistics and normalizer != "softmax")
    return _empty_like(q), lse, *(torch.empty_like(lse) if yes else lse.new_empty(0) for yes in wanted)


def _in_scores(x: float | None, scale: float) -> float | None:
    """In the unit of the kernels' scores."""
    return None if x is None else x / scale


@_on_its_device
def _forward(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, end_key: Tensor | None, first_query: Tensor | None,
    last_query: Tensor | None, doc_start: Tensor | None, doc_end: Tensor | None, sink_logit: Tensor | None,
    slopes: Tensor | None, shared_from: int, shared_to: int, scale: float, softcap: float | None, normalizer: str,
    normalized: bool, bias: float | None, eps: float, statistics: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(q)
    B, H, T, D = q.shape
    outputs = _outputs(q, statistics, sink_logit is not None, normalizer)
    o = outputs[0]
    q, k, v = _readable(q, k, v)
    first_key, end_key, doc_start, doc_end, sink_logit, slopes = _contiguous(
        first_key, end_key, doc_start, doc_end, sink_logit, slopes
    )
    meta = _meta(q)
    t = _tiles("forward+statistics" if statistics else "forward", q)
    G = H // k.shape[1]
    triton_kernels.forward_kernel[(B * H * triton.cdiv(T, t.block_m),)](
        q, k, v, *outputs, first_key, end_key, doc_start, doc_end, sink_logit, slopes,
        *_strides(q, k, v, o), H, G, T, D, G * section(B * H // G, 2 * _head_bytes(q)), shared_from, shared_to, scale,
        _in_scores(softcap, scale), _in_scores(bias, scale), eps,
        BLOCK_M=t.block_m, BLOCK_N=t.block_n, HAS_FIRST=first_key is not None, HAS_END=end_key is not None,
        HAS_DOCS=doc_start is not None, HAS_SINK=sink_logit is not None, STATISTICS=statistics,
        NORMALIZER=normalizer, NORMALIZED=normalized, WGMMA=_wgmma(), **meta,
        **t.options,
    )  # fmt: skip
    return outputs


@_on_its_device
def _backward_kernels(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    first_key: Tensor | None, end_key: Tensor | None, first_query: Tensor | None, last_query: Tensor | None,
    sink_logit: Tensor | None, slopes: Tensor | None, shared_from: int, shared_to: int, scale: float,
    softcap: float | None, normalizer: str, normalized: bool, bias: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(q)
    B, H, T, D = q.shape
    G = H // k.shape[1]
    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    grad, q, k, v, output = _readable(grad, q, k, v, output)
    lse = lse.contiguous()
    grad_lse, first_key, end_key, first_query, last_query, sink_logit, slopes = _contiguous(
        grad_lse, first_key, end_key, first_query, last_query, sink_logit, slopes
    )
    delta = torch.empty_like(lse)
    meta = _meta(q)
    meta |= {"HAS_FIRST": first_key is not None, "HAS_END": end_key is not None}
    meta |= {"NORMALIZER": normalizer, "NORMALIZED": normalized}
    factors = scale, _in_scores(softcap, scale), _in_scores(bias, scale)
    triton_kernels.delta_kernel[(B * H * triton.cdiv(T, 64),)](
        output, grad, grad_lse, delta, *_strides(output, grad), H, T, D,
        BLOCK_M=64, BLOCK_D=meta["BLOCK_D"], HAS_GRAD_LSE=grad_lse is not None, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    t = _tiles("dq", q)
    triton_kernels.dq_kernel[(B * H * triton.cdiv(T, t.block_m),)](
        q, k, v, grad, lse, delta, dq, first_key, end_key, slopes, *_strides(q, k, v, grad, dq),
        H, G, T, D, G * section(B * H // G, 2 * _head_bytes(q)), shared_from, shared_to, *factors,
        BLOCK_M=t.block_m, BLOCK_N=t.block_n, WGMMA=_wgmma(), **meta,
        **t.options,
    )  # fmt: skip
    t = _tiles("dkv+groups" if G > 1 else "dkv", q)
    triton_kernels.dkv_kernel[(B * H // G * triton.cdiv(T, t.block_n),)](
        q, k, v, grad, lse, delta, dk, dv, first_query, last_query, slopes,
        *_strides(q, k, v, grad, dk, dv), H, G, T, D, section(B * H // G, 2 * G * _head_bytes(q)), shared_from,
        shared_to, *factors, BLOCK_M=t.block_m, BLOCK_N=t.block_n, GROUPED=G > 1, **meta,
        **t.options,
    )  # fmt: skip
    if sink_logit is None:
        return dq, dk, dv, q.new_empty(0)
    learned_sink_mass = (per_query(sink_logit, lse) - lse).exp()
    return dq, dk, dv, -(learned_sink_mass * delta).sum((0, 2)).to(sink_logit.dtype)


@_on_its_device
def _received(
    q: Tensor, k: Tensor, lse: Tensor, first_query: Tensor | None, last_query: Tensor | None, shared_from: int,
    shared_to: int, scale: float,
) -> Tensor:  # fmt: skip
    _check(q)
    B, H, T, D = q.shape
    q, k = _readable(q, k)
    lse = lse.contiguous()
    first_query, last_query = _contiguous(first_query, last_query)
    received = torch.empty_like(lse)
    meta = _meta(q)
    t = _tiles("received", q)
    triton_kernels.received_kernel[(B * H * triton.cdiv(T, t.block_n),)](
        q, k, lse, received, first_query, last_query, *_strides(q, k),
        H, H // k.shape[1], T, D, section(B * H, _head_bytes(q)), shared_from, shared_to, scale,
        BLOCK_M=t.block_m, BLOCK_N=t.block_n,
        HAS_FIRST=last_query is not None, HAS_END=first_query is not None, **meta,
        **t.options,
    )  # fmt: skip
    return received


for _device in ("cuda", "cpu"):  # "cpu" for the interpreter
    torch.library.impl("sinkbed::attention_triton", _device)(_forward)
    torch.library.impl("sinkbed::attention_triton_backward", _device)(_backward_kernels)
    torch.library.impl("sinkbed::attention_received_triton", _device)(_received)


@torch.library.register_fake("sinkbed::attention_triton")
def _(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sink_logit, normalizer, statistics = rest[8], rest[-5], rest[-1]
    return _outputs(q, statistics, sink_logit is not None, normalizer)


@torch.library.register_fake("sinkbed::attention_triton_backward")
def _(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    first_key: Tensor | None, end_key: Tensor | None, first_query: Tensor | None, last_query: Tensor | None,
    sink_logit: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsink = q.new_empty(0) if sink_logit is None else sink_logit.new_empty(sink_logit.shape)
    return _empty_like(q), _empty_like(k), _empty_like(v), dsink


@torch.library.register_fake("sinkbed::attention_received_triton")
def _(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    return lse.new_empty(lse.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, first_key, end_key, first_query, last_query, _, _, sink_logit, slopes, *settings, _ = inputs
    o, lse, *others = output
    ctx.save_for_backward(q, k, v, o, lse, first_key, end_key, first_query, last_query, sink_logit, slopes)
    ctx.settings = settings  # shared_from to eps
    ctx.mark_non_differentiable(*others, *([lse] if settings[4] != "softmax" else []))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_forward_mode(grad, grad_lse)
    q, k, v, o, lse, first_key, end_key, first_query, last_query, sink_logit, slopes = ctx.saved_tensors
    dq, dk, dv, dsink = torch.ops.sinkbed.attention_triton_backward(
        torch.zeros_like(o) if grad is None else grad, grad_lse, q, k, v, o, lse, first_key, end_key, first_query,
        last_query, sink_logit, slopes, *ctx.settings,
    )  # fmt: skip
    return dq, dk, dv, *[None] * 6, (None if sink_logit is None else dsink), *[None] * 10


torch.library.register_autograd("sinkbed::attention_triton", _backward, setup_context=_setup_context)
refuse_second_backward("sinkbed::attention_triton_backward")


def _check(q: Tensor) -> None:
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"q: expected a head dim of {', '.join(map(str, HEAD_DIMS))}, got {q.shape[-1]}")
    if q.dtype == torch.float64:
        raise ValueError("q: expected float32, float16 or bfloat16, got torch.float64; use implementation='reference'")


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scoring: Scoring, statistics: bool
) -> tuple[Tensor, Tensor | None, Statistics | None]:
    """Attention by the Triton kernels; shapes as in `kernels.api.attention`.

    Raises ValueError for head dims other than HEAD_DIMS, for float64, and for a scoring that the kernels lack.
    """
    _check(q)
    fused = Fused("softmax") if scoring.normalizer is None else scoring.normalizer.triton
    if fused is None:
        raise ValueError(
            f"normalizer {type(scoring.normalizer).__name__}: expected implementation 'reference', which has any, "
            "got 'triton', whose kernels lack it"
        )
    logit, value = scoring.sink_logit, scoring.sink_value
    outside = logit if value is not None or (logit is not None and logit.ndim == 3) else None
    inside = logit if outside is None else None
    output, lse, *measured = torch.ops.sinkbed.attention_triton(
        q, k, v, mask.first_key, mask.end_key, mask.first_query, mask.last_query,
        mask.doc_start if statistics else None, mask.doc_end if statistics else None, inside,
        None if scoring.slopes is None else scoring.slopes.float(),
        *mask.shared, scoring.scale, scoring.softcap, *fused, statistics,
    )  # fmt: skip
    seen = None
    if statistics:
        first_key_mass, document_mass, *optional = measured
        seen = Statistics(first_key_mass, document_mass, *(x if x.numel() else None for x in optional))
    if outside is not None:
        return with_key(output, lse, seen, outside, value)
    return output, (lse if scoring.normalizer is None else None), seen


def triton_received(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, scale: float) -> Tensor:
    """Column sums by the Triton kernel; shapes as in `kernels.api.attention_received`. Raises as `triton_attention`."""
    _check(q)
    received = torch.ops.sinkbed.attention_received_triton(
        q, k, lse.float(), mask.first_query, mask.last_query, *mask.shared, scale
    )
    return received.to(lse.dtype)
