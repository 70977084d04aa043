"""Dense attention in plain PyTorch: the oracle of every implementation. Honours every argument, any dtype.

It materialises the [B, H, T, T] probabilities, so it is for tests and small inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkbed.kernels.mask import Mask
from sinkbed.kernels.normalizers import Normalizer
from sinkbed.kernels.statistics import Statistics


def probabilities(
    q: Tensor,
    k: Tensor,
    mask: Mask,
    scale: float,
    sink_logit: Tensor | None,
    normalizer: Normalizer | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention matrix and log-sum-exp.

    Args:
        q: [B, H, T, D]; k: [B, Hkv, T, D] with H a multiple of Hkv; sink_logit: [H] or None.

    Returns:
        A [B, H, T, T] (rows of the softmax sum to 1 minus the mass on the learned sink) and lse [B, H, T] in natural
        log, the learned sink included.
    """
    groups = q.shape[1] // k.shape[1]
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(groups, dim=1)) * scale
    logits = logits.masked_fill(~mask.visible(q.device), float("-inf"))
    lse = logits.logsumexp(-1)
    if sink_logit is not None:
        lse = torch.logaddexp(lse, sink_logit.to(lse.dtype)[None, :, None])
    return (logits - lse[..., None]).exp() if normalizer is None else normalizer.weights(logits), lse


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    sink_logit: Tensor | None,
    statistics: bool,
    normalizer: Normalizer | None = None,
) -> tuple[Tensor, Tensor, Statistics | None]:
    """Attention by its definition; differentiable in every input. Shapes as in `kernels.api.attention`."""
    a, lse = probabilities(q, k, mask, scale, sink_logit, normalizer)
    output = a @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if not statistics:
        return output, lse, None
    with torch.no_grad():
        first_key_mass = a[..., 0]
        start = mask.doc_start
        if start is None:
            document_mass = first_key_mass
        else:
            index = start.long()[:, None, :, None].expand(-1, a.shape[1], -1, 1)
            document_mass = a.gather(-1, index)[..., 0]
        learned_sink_mass = None if sink_logit is None else (sink_logit.to(lse.dtype)[None, :, None] - lse).exp()
    return output, lse, Statistics(first_key_mass.detach(), document_mass.detach(), learned_sink_mass)


def reference_received(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, scale: float) -> Tensor:
    """Column sums of the attention matrix; shapes as in `kernels.api.attention_received`."""
    groups = q.shape[1] // k.shape[1]
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(groups, dim=1)) * scale
    p = (logits - lse[..., None]).exp().masked_fill(~mask.visible(q.device), 0.0)
    return p.sum(2).to(lse.dtype)
