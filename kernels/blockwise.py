"""Attention of any scoring, in blocks of queries: what the fused kernels lack, without the T×T matrix.

Each block sees the keys up to its last visible one. The backward pass computes a block's weights again, so memory is
a block times T; those of a softmax in short rows are kept for it. A rerun is bitwise equal.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sinkbed.kernels.mask import Mask
from sinkbed.kernels.normalizers import Linearized
from sinkbed.kernels.scoring import Scoring
from sinkbed.kernels.statistics import Statistics, blocks_of, with_key

_QUERIES, _BLOCK_LOGITS = 64, 2**19  # of a block: measured, see `_blocks`
_KEPT = 1024
"""Longest row of which weights are kept: they take about as much memory as what else of a layer is."""


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scoring: Scoring, statistics: bool
) -> tuple[Tensor, Tensor | None, Statistics | None]:
    """Shapes as in `kernels.api.attention`; differentiable in every input, and in the weights of a normaliser."""
    own = () if scoring.normalizer is None else scoring.normalizer.parameters()
    parameters = [parameter for parameter in own if parameter.requires_grad]
    output, lse, first, document, total = _Blockwise.apply(q, k, v, mask, scoring, statistics, *parameters)
    seen = Statistics(first, first if document is None else document, None, row_sum=total) if statistics else None
    if scoring.sink_logit is None:
        return output, lse, seen
    return with_key(output, lse, seen, scoring.sink_logit, scoring.sink_value)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)  # logits are float32's, in both passes
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scoring: Scoring, statistics: bool, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        keeps = scoring.normalizer is None and scoring.softcap is None and q.shape[2] <= _KEPT
        kept: list[Tensor] = []
        ctx.mask, ctx.scoring, ctx.parameters = mask, scoring, len(parameters)
        ctx.set_materialize_grads(False)
        output, inputs = torch.empty_like(q), (q, k, v)
        k, v = k.contiguous(), v.to(_product_dtype(v)).contiguous()
        linearized, hidden = _normalizer(scoring)
        per_query: dict[str, Tensor] = {}
        for rows, queries, end in _blocks(q, mask):
            logits, _ = scoring.block(q[rows], k[rows], mask, rows, queries, end, hidden)
            weights, total, _ = linearized(logits)
            values: dict[str, Tensor] = {}
            if scoring.normalizer is None:
                values["lse"] = logits.amax(-1) - weights.amax(-1).log()
            rounded = _grouped(weights, v).to(v.dtype)
            if keeps:
                kept.append(rounded)
            mixed = _heads(rounded @ v[rows, :, :end], q)
            output[rows, :, queries] = mixed if total is None else mixed / total
            if statistics:
                values |= {"first_key": weights[..., 0], "sum": weights.sum(-1)}
                if mask.doc_start is not None:
                    start = mask.doc_start[rows, None, queries, None].long().expand(-1, q.shape[1], -1, 1)
                    values["document"] = weights.gather(-1, start)[..., 0]
                if total is not None:
                    values = {name: value / total[..., 0] for name, value in values.items()}
            for name, value in values.items():
                if name not in per_query:
                    per_query[name] = value.new_empty(q.shape[:3])
                per_query[name][rows, :, queries] = value
        ctx.save_for_backward(*inputs, *kept)
        total = per_query.get("sum") if scoring.normalizer is not None else None
        seen = (per_query.get("first_key"), per_query.get("document"), total)
        ctx.mark_non_differentiable(*(x for x in seen if x is not None))
        return output, per_query.get("lse"), *seen

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        sums = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=sums) for x in (k, v))
        products = _product_dtype(v)
        k, v = k.to(products).contiguous(), v.to(products).contiguous()
        linearized, hidden = _normalizer(scoring)
        d_parameters: list[Any] = [0] * ctx.parameters
        for index, (rows, queries, end) in enumerate(_blocks(q, ctx.mask)):
            keys = (rows, slice(None), slice(end))
            if kept:
                (weights, total, pullback), squashed = _softmax_of(_heads(kept[index], q)), None
            else:
                logits, squashed = scoring.block(q[rows], k[rows], ctx.mask, rows, queries, end, hidden)
                weights, total, pullback = linearized(logits)
            if grad is None:
                d_weights = torch.zeros_like(weights)
            else:
                upstream = grad[rows, :, queries]
                grouped = _grouped(upstream if total is None else upstream / total, v).to(products)
                dv[keys] += _grouped(weights, v).to(products).mT @ grouped
                d_weights = (grouped @ v[keys].mT).view_as(weights).to(weights.dtype)
            d_total = None if total is None else -torch.linalg.vecdot(weights, d_weights)[..., None] / total
            d_logits, *d_of_block = pullback(d_weights, d_total)
            if grad_lse is not None:
                d_logits = d_logits + weights * grad_lse[rows, :, queries, None]
            if squashed is not None:
                d_logits = torch.ops.aten.tanh_backward(d_logits, squashed)
            d_products = _grouped(d_logits, k).to(products)
            dq[rows, :, queries] = _heads(d_products @ k[keys], q).mul_(scoring.scale)
            dk[keys] += d_products.mT @ (_grouped(q[rows, :, queries], k).to(products) * scoring.scale)
            d_parameters = [a + b for a, b in zip(d_parameters, d_of_block, strict=True)]
        return dq, dk.to(q.dtype), dv.to(q.dtype), None, None, None, *d_parameters


def _blocks(q: Tensor, mask: Mask) -> Iterator[tuple[slice, slice, int]]:
    """Blocks of rows and queries, with the exclusive end of the keys that they see.

    The logits of a block take about 2 MB, which the cache of a core holds.
    """
    B, H, T, _ = q.shape
    rows = max(1, _BLOCK_LOGITS // (H * T * _QUERIES))
    for row in range(0, B, rows):
        for queries in blocks_of(T, _QUERIES):
            yield slice(row, row + rows), queries, int(queries.stop) if mask.end_key is None else T


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, M, …] as [B, Hkv, H/Hkv · M, …]: the query heads of a key head together."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[3])


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """The reverse of `_grouped`."""
    return x.view(x.shape[0], q.shape[1], -1, x.shape[3])


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of products with weights: that of x, but float32 for float16, whose range undivided weights can leave."""
    return torch.promote_types(x.dtype, torch.bfloat16)


def _normalizer(scoring: Scoring) -> tuple[Callable[[Tensor], Linearized], float]:
    """How weights are made of logits, and the logit of a hidden key."""
    if scoring.normalizer is None:
        return _softmax, float("-inf")
    return scoring.normalizer.linearized, scoring.normalizer.hidden_logit


def _softmax(logits: Tensor) -> Linearized:
    return _softmax_of(logits.softmax(-1))


def _softmax_of(weights: Tensor) -> Linearized:
    return Linearized(
        weights, None, lambda d, _: (torch.ops.aten._softmax_backward_data(d, weights, -1, weights.dtype),)
    )
