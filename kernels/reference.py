"""Dense attention in plain PyTorch: the oracle of every implementation. Honours every argument, any dtype.

It materialises the [B, H, T, T] probabilities, so it is for tests and small inputs.
"""

import torch
from torch import Tensor

from sinkbed.kernels.mask import Mask
from sinkbed.kernels.scoring import Scoring, no_autocast, per_query
from sinkbed.kernels.statistics import Statistics


def probabilities(q: Tensor, k: Tensor, mask: Mask, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Attention matrix and log-sum-exp.

    Args:
        q: [B, H, T, D]; k: [B, Hkv, T, D] with H a multiple of Hkv.

    Returns:
        A [B, H, T, T] (rows of the softmax sum to 1 minus the mass on the learned sink) and lse [B, H, T] in natural
        log, the learned sink included; no lse with a normaliser.
    """
    groups = q.shape[1] // k.shape[1]
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(groups, dim=1)) * scoring.scale
    if scoring.softcap is not None:
        logits = scoring.softcap * torch.tanh(logits / scoring.softcap)
    if scoring.slopes is not None:
        index = torch.arange(q.shape[2], device=q.device)
        distance = (index[:, None] - index).to(logits.dtype)
        logits = logits - torch.einsum("h,ij->hij", scoring.slopes.to(logits.dtype), distance)
    logits = logits.masked_fill(~mask.visible(q.device), float("-inf"))
    if scoring.normalizer is not None:
        return scoring.normalizer.weights(logits), None
    lse = logits.logsumexp(-1)
    if scoring.sink_logit is not None:
        lse = torch.logaddexp(lse, per_query(scoring.sink_logit, lse))
    return (logits - lse[..., None]).exp(), lse


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scoring: Scoring, statistics: bool
) -> tuple[Tensor, Tensor | None, Statistics | None]:
    """Attention by its definition; differentiable in every input. Shapes as in `kernels.api.attention`."""
    with no_autocast(q.device):
        return _attention(q, k, v, mask, scoring, statistics)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scoring: Scoring, statistics: bool
) -> tuple[Tensor, Tensor | None, Statistics | None]:
    a, lse = probabilities(q, k, mask, scoring)
    output = a @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    learned_sink_mass = None
    if scoring.sink_logit is not None and lse is not None:
        learned_sink_mass = (per_query(scoring.sink_logit, lse) - lse).exp()
        if scoring.sink_value is not None:
            output = output + torch.einsum(
                "bht,hd->bhtd", learned_sink_mass.to(v.dtype), scoring.sink_value.to(v.dtype)
            )
        learned_sink_mass = learned_sink_mass.detach()
    if not statistics:
        return output, lse, None
    with torch.no_grad():
        first_key_mass = document_mass = a[..., 0]
        if mask.doc_start is not None:
            index = mask.doc_start.long()[:, None, :, None].expand(-1, a.shape[1], -1, 1)
            document_mass = a.gather(-1, index)[..., 0]
        row_sum = None if scoring.normalizer is None else a.sum(-1)
        measured = Statistics(first_key_mass.detach(), document_mass.detach(), learned_sink_mass, row_sum)
    return output, lse, measured


def reference_received(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, scale: float) -> Tensor:
    """Column sums of the attention matrix; shapes as in `kernels.api.attention_received`."""
    groups = q.shape[1] // k.shape[1]
    with no_autocast(q.device):
        logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(groups, dim=1)) * scale
    p = (logits - lse[..., None]).exp().masked_fill(~mask.visible(q.device), 0.0)
    return p.sum(2).to(lse.dtype)
