"""Attention on CPUs: PyTorch's flash kernel plus our statistics and sink.

`aten._scaled_dot_product_flash_attention_for_cpu` returns the log-sum-exp that the statistics need, and
its backward accepts any consistent (output, lse): called with the sink-corrected pair it yields the exact
gradients of attention with a learned sink. It is a private operator, so a test pins its behaviour.

The trade: a mask other than causal travels as an additive [B, 1, T, T] float, built once per batch, and PyTorch
computes the hidden pairs too. For a document mask on long rows each document is a call of its own, plain causal.
The statistics never need the T×T probabilities: the mass of one key is exp(q·k − lse).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sinkbed.kernels.blockwise import blockwise_attention
from sinkbed.kernels.derivatives import refuse_forward_mode, refuse_second_backward
from sinkbed.kernels.mask import Mask
from sinkbed.kernels.scoring import Scoring, per_query
from sinkbed.kernels.statistics import Statistics, with_key

_BY_DOCUMENT = 512
"""Row length from which a document mask is computed document by document: on shorter rows the calls cost more than the
hidden pairs."""

_UNROLLED = 512
"""Longest row whose blocks are compiled, one after the other: half of it and four layers take 43 s."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Defined by schema rather than by `torch.library.custom_op`, whose checks of every call would cost a tenth of a small
# model's attention.
torch.library.define(
    "sinkbed::attention_torch",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? doc_start, Tensor? sink_logit, Tensor? sink_value, "
    "float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "sinkbed::attention_torch_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, Tensor? bias, "
    "Tensor? doc_start, Tensor? sink_logit, Tensor? sink_value, float scale) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_attention_torch = torch.ops.sinkbed.attention_torch.default
_attention_torch_backward = torch.ops.sinkbed.attention_torch_backward.default


def _documents(doc_start: Tensor) -> list[tuple[slice, slice, slice]]:
    """Index of each document of a batch in a tensor [B, H, T, …]."""
    parts = []
    for row, starts in enumerate(doc_start.tolist()):
        bounds = [*sorted(set(starts)), len(starts)]
        parts += [(slice(row, row + 1), slice(None), slice(a, b)) for a, b in pairwise(bounds)]
    return parts


def _logits(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[B, Hkv, H/Hkv, T, T]: the bias replaces a hidden logit instead of being added to it, as an infinite one would
    become nan. PyTorch's kernel adds; a key of 1e38 in another document may not reach a query."""
    logits = (_grouped(q, k) @ k[:, :, None].mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return logits.masked_fill(bias[:, :, None] == -torch.inf, -torch.inf)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, ...] as [B, Hkv, H/Hkv, ...]."""
    return x.unflatten(1, (k.shape[1], -1))


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and lse where logits overflow."""
    logits = _logits(q, k, bias, scale)
    lse = logits.logsumexp(-1)
    output = (logits - lse[..., None]).exp().to(v.dtype) @ v[:, :, None]
    return output.flatten(1, 2), lse.flatten(1, 2)


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_dense`, for an output and lse that may hold a sink."""
    hidden = bias[:, :, None] == -torch.inf  # a query whose lse is no number has gradients for its own keys only
    p = (_logits(q, k, bias, scale) - _grouped(lse, k)[..., None]).exp().masked_fill(hidden, 0)
    grouped, delta = _grouped(grad, k), _grouped((grad * output).sum(-1, keepdim=True), k)
    ds = (p * (grouped @ v[:, :, None].mT - delta) * scale).masked_fill(hidden, 0).to(q.dtype)
    dq = (ds @ k[:, :, None]).flatten(1, 2)
    return dq, (ds.mT @ _grouped(q, k)).sum(2), (p.to(v.dtype).mT @ grouped).sum(2)


@torch.library.impl("sinkbed::attention_torch", "cpu")
@torch.autocast("cpu", enabled=False)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    doc_start: Tensor | None,
    sink_logit: Tensor | None,
    sink_value: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if doc_start is None:
        output, lse = _flash(q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale)
        if bias is not None and not bool(lse.isfinite().all()):
            output, lse = _dense(q, k, v, bias, scale)
    else:
        output, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for part in _documents(doc_start):
            output[part], lse[part] = _flash(q[part], k[part], v[part], 0.0, True, scale=scale)
    if sink_logit is not None:
        output, lse, _ = with_key(output, lse, None, sink_logit, sink_value)
    return output, lse.contiguous()


@torch.library.register_fake("sinkbed::attention_torch")
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.impl("sinkbed::attention_torch_backward", "cpu")
@torch.autocast("cpu", enabled=False)
def _backward_kernel(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    doc_start: Tensor | None,
    sink_logit: Tensor | None,
    sink_value: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if doc_start is None:
        dq, dk, dv = _flash_backward(grad, q, k, v, output, lse, 0.0, bias is None, attn_mask=bias, scale=scale)
        if bias is not None and not bool((dq.sum() + dk.sum()).isfinite()):
            for gradient, exact in zip(
                (dq, dk, dv), _dense_backward(grad, q, k, v, output, lse, bias, scale), strict=True
            ):
                gradient.copy_(exact)
    else:
        dq, dk, dv = (_empty_gradient(x) for x in (q, k, v))
        for part in _documents(doc_start):
            inputs = (x[part] for x in (grad, q, k, v, output, lse))
            dq[part], dk[part], dv[part] = _flash_backward(*inputs, 0.0, True, scale=scale)
    if sink_logit is None:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0)
    delta = (grad * output).sum(-1, dtype=lse.dtype)  # [B, H, T]
    learned_sink_mass = (per_query(sink_logit, lse) - lse).exp()
    d_value = q.new_empty(0)
    if sink_value is not None:
        delta = delta - (grad * sink_value[:, None].to(grad.dtype)).sum(-1, dtype=lse.dtype)
        d_value = (learned_sink_mass[..., None] * grad).sum((0, 2)).to(sink_value.dtype)
    return dq, dk, dv, _summed_to(-(learned_sink_mass * delta), sink_logit), d_value


@torch.library.register_fake("sinkbed::attention_torch_backward")
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, sink_logit, sink_value, _ = rest
    sinks = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (sink_logit, sink_value))
    return *(_empty_gradient(x) for x in (q, k, v)), *sinks


def _empty_gradient(x: Tensor) -> Tensor:
    """Of x [B, H, T, D], laid out as [B, T, H, D], as the flash kernel's are whatever x is."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _summed_to(gradient: Tensor, sink_logit: Tensor) -> Tensor:
    """A gradient [B, H, T] for a logit a query, or for one a head."""
    return (gradient if sink_logit.ndim == 3 else gradient.sum((0, 2))).to(sink_logit.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_forward_mode(grad, grad_lse)
    q, k, v, bias, doc_start, sink_logit, sink_value, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    dq, dk, dv, dsink, d_value = _attention_torch_backward(
        grad, q, k, v, out, lse, bias, doc_start, sink_logit, sink_value, ctx.scale
    )
    if grad_lse is not None:
        dq, dk, dsink = _add_lse_gradient(ctx, grad_lse, dq, dk, dsink)
    d_sinks = (None if sink_logit is None else dsink, None if sink_value is None else d_value)
    return dq, dk, dv, None, None, *d_sinks, None


def _add_lse_gradient(
    ctx: Any, grad_lse: Tensor, dq: Tensor, dk: Tensor, dsink: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d lse_i / d s_ij = P_ij: dq gains scale · dlse · P k, attention with the keys as values; dk gains
    scale · Pᵀ (dlse q), which is the gradient of those values for an incoming dlse · q. Two more passes, paid by who
    asks for it."""
    q, k, _, bias, doc_start, sink_logit, _, _, lse = ctx.saved_tensors
    weight = (grad_lse * ctx.scale).to(q.dtype)[..., None]
    masks = (bias, doc_start, sink_logit, None)
    mixed, _ = _attention_torch(q, k, k, *masks, ctx.scale)
    _, _, weighted, _, _ = _attention_torch_backward(weight * q, q, k, k, mixed, lse, *masks, ctx.scale)
    if sink_logit is not None:
        learned_sink_mass = (per_query(sink_logit, lse) - lse).exp()
        dsink = dsink + _summed_to(learned_sink_mass * grad_lse, sink_logit)
    return dq + weight * mixed, dk + weighted, dsink


torch.library.register_autograd("sinkbed::attention_torch", _backward, setup_context=_setup_context)
refuse_second_backward("sinkbed::attention_torch_backward")


@torch.no_grad()
def _mass_on(k_first: Tensor, q: Tensor, lse: Tensor, scale: float) -> Tensor:
    """exp(scale · q·k_first − lse): [B, H, T]; k_first [B, Hkv, T or 1, D], one key for each query."""
    B, H, T, D = q.shape
    grouped = q.to(lse.dtype).reshape(B, k_first.shape[1], -1, T, D)
    logit = (grouped * k_first[:, :, None]).sum(-1).reshape(B, H, T) * scale
    return (logit - lse).exp()


@torch.no_grad()
def _statistics(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, scale: float, sink_logit: Tensor | None) -> Statistics:
    first_key_mass = _mass_on(k[:, :, :1], q, lse, scale)
    document_mass = first_key_mass
    if mask.doc_start is not None:
        index = mask.doc_start.long()[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        document_mass = _mass_on(k.gather(2, index), q, lse, scale)
    if mask.first_key is not None:
        first_key = mask.first_key[:, None, :]
        if mask.shared_prefix == 0 or mask.shared_from > 0:
            first_key_mass = first_key_mass.masked_fill(first_key > 0, 0.0)
        if mask.doc_start is not None:
            start = mask.doc_start[:, None, :]
            shared = (start >= mask.shared_from) & (start < mask.shared_prefix)
            unseen = (first_key > start) & ~shared
            document_mass = document_mass.masked_fill(unseen, 0.0)
        else:
            document_mass = first_key_mass
    learned_sink_mass = None if sink_logit is None else (per_query(sink_logit, lse) - lse).exp()
    return Statistics(first_key_mass, document_mass, learned_sink_mass)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scoring: Scoring, statistics: bool
) -> tuple[Tensor, Tensor | None, Statistics | None]:
    """Attention by the CPU flash kernel; in blocks where the scoring is not plain, or gradients are due in half
    precision, at which the flash kernel's backward is up to six times slower. Shapes as in `kernels.api`."""
    by_document = mask.is_document and mask.length >= _BY_DOCUMENT
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    short = mask.length <= _UNROLLED or not torch.compiler.is_compiling()
    if not scoring.is_plain or (q.dtype.itemsize == 2 and trains and short and not by_document):
        return blockwise_attention(q, k, v, mask, scoring, statistics)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias = None if mask.is_causal or by_document else mask.bias(q.dtype, q.device)
    documents = mask.doc_start if by_document else None
    sink_logit = scoring.sink_logit
    output, lse = _attention_torch(q, k, v, bias, documents, sink_logit, scoring.sink_value, scoring.scale)
    if not statistics:
        return output, lse, None
    return output, lse, _statistics(q, k, lse.detach(), mask, scoring.scale, sink_logit)
