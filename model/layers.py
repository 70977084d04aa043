"""The parts of a block: RMSNorm, rotary positions, SwiGLU.

On a CPU the composite forms of these cost as much as a matrix product at small widths, so each has a form
with few passes over memory; tests hold them to the plain definitions, forward and gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _by_hand(x: Tensor) -> bool:
    """Whether the forms written for CPUs apply; the compiler and accelerators fuse the plain ones better, and
    autocast must see the plain operators."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
        )
        centring = (grad @ weight).div_(weight.numel()).unsqueeze(-1).mul_(rstd)
        return dx.add_(centring), dweight, None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if _by_hand(x):
            return _RMSNormCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotations(positions: Tensor, dim: int, base: float) -> Tensor:
    """Unit complex numbers exp(i · position · base^(−2n/D)) of rotary positions (arXiv 2104.09864).

    positions [B, T] or [T] -> complex64 [B or 1, T, 1, D/2], ready to broadcast over heads.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angle = positions.to(torch.float32)[..., None] * base**-exponent
    angle = angle if angle.ndim == 3 else angle[None]
    return torch.polar(torch.ones_like(angle), angle)[:, :, None, :]


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, T, H, D] by `rotations`; as in Meta's Llama, in float32.

    Pairs are neighbours (2n, 2n+1); Hugging Face's Llama pairs (n, n + D/2), which is a permutation of
    the projections' rows that import and export apply.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).type_as(x)


class _SwiGLUCPU(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)) and its gradient by hand.

    Gate and up are multiplied apart, so that what follows runs over contiguous memory, and the gradient
    reuses its buffers: a tenth faster than autograd at small widths.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        w_gate, w_up = gate_up.chunk(2)
        gate, up = flat @ w_gate.T, flat @ w_up.T
        sigmoid = gate.sigmoid()
        activated = gate.mul_(sigmoid)
        ctx.save_for_backward(flat, gate_up, down, sigmoid, up, activated)
        return ((activated * up) @ down.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat, gate_up, down, sigmoid, up, activated = ctx.saved_tensors
        w_gate, w_up = gate_up.chunk(2)
        d_gate_up = torch.empty_like(gate_up)
        d_w_gate, d_w_up = d_gate_up.chunk(2)
        upstream = grad.flatten(0, -2)
        hidden = activated * up
        d_down = upstream.T @ hidden
        d_hidden = upstream @ down
        d_up = torch.mul(d_hidden, activated, out=hidden)
        torch.mm(d_up.T, flat, out=d_w_up)
        # silu'(g) = σ(g) + silu(g) − silu(g) σ(g), without the exponential of another sigmoid
        d_gate = torch.addcmul(sigmoid, activated, sigmoid, value=-1).add_(activated).mul_(d_hidden.mul_(up))
        torch.mm(d_gate.T, flat, out=d_w_gate)
        dx = (d_gate @ w_gate).addmm_(d_up, w_up)
        return dx.view(*grad.shape[:-1], -1), d_gate_up, d_down


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) without biases (arXiv 2002.05202); gate and up are one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if _by_hand(x):
            return _SwiGLUCPU.apply(x, self.gate_up.weight, self.down.weight)
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
