"""RMSNorm (arXiv 1910.07467)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sinkbed.model.config import DecoderConfig
from sinkbed.model.eager import is_eager_cpu
from sinkbed.model.norms import NORMS

_EXACT = (torch.float32, torch.float64)
"""In half precision squares would overflow, and gradients of the weight be summed over the rows."""


class _RMSNormCPU(torch.autograd.Function):
    """RMSNorm on the CPU's fused LayerNorm backward.

    With mean 0, LayerNorm's backward differs from RMSNorm's only by the term −mean(g·w)/rms that centring
    would have contributed; adding it back gives the exact gradient in half the passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(weight.numel()).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
        )
        centring = (grad @ weight).div_(weight.numel()).unsqueeze(-1).mul_(rstd)
        return dx.add_(centring), dweight, None


@NORMS.register("rms")
class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight; x [..., C], weight [C]."""
    if is_eager_cpu(x) and x.dtype == weight.dtype and x.dtype in _EXACT:
        return _RMSNormCPU.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _HeadNormCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        normalized = x * rstd
        ctx.save_for_backward(normalized, weight, rstd)
        return normalized * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normalized, weight, rstd = ctx.saved_tensors
        dweight = (grad * normalized).flatten(0, -3).sum(0)
        dx = grad * weight
        mean = torch.linalg.vecdot(dx, normalized).div_(normalized.shape[-1]).unsqueeze(-1)
        return dx.addcmul_(normalized, mean, value=-1).mul_(rstd), dweight, None


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` with a weight a head, in one pass over all heads; x [..., H, D], weight [H, D]."""
    if is_eager_cpu(x) and x.dtype == weight.dtype and x.dtype in _EXACT:
        return _HeadNormCPU.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape[1:], None, eps).to(x.dtype) * weight.to(x.dtype)  # autocast's may be float32
