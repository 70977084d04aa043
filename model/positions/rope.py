"""Rotary positions (RoPE, arXiv 2104.09864)."""

import torch
from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import POSITIONS, PositionEncoding
from sinkbed.ranges import check_number


@POSITIONS.register("rope")
class Rope(PositionEncoding):
    """Pairs of q and k turned by an angle that grows with the position.

    `theta` is the base of the frequencies, `share` the part of a head's dimensions that is turned (GPT-NeoX's
    rotary_pct); the rest has no position.
    """

    def __init__(self, config: DecoderConfig, *, theta: float = 10_000.0, share: float = 1.0) -> None:
        check_number("model.decoder.position.rope.theta", theta, above=0)
        check_number("model.decoder.position.rope.share", share, above=0, most=1)
        self.dim, self.theta = round(share * config.dim), theta
        self.rotates_all = self.dim == config.dim
        if self.dim % 2 or not self.dim:
            raise ValueError(
                f"model.decoder.position.rope: expected an even number of dimensions to turn in pairs, got {self.dim} "
                f"of head_dim {config.dim}; change head_dim or share"
            )

    def prepare(self, positions: Tensor) -> Tensor:
        return rotations(positions, self.dim, self.theta)

    def rotate(self, x: Tensor, prepared: Tensor) -> Tensor:
        if self.rotates_all:
            return rotate(x, prepared)
        return torch.cat([rotate(x[..., : self.dim].contiguous(), prepared), x[..., self.dim :]], -1)


def rotations(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Unit complex numbers exp(i · position · theta^(−2n/D)) of rotary positions (arXiv 2104.09864).

    positions [B, T] or [T] -> complex64 [B, T, 1, D/2] or [T, 1, D/2], ready to broadcast over heads.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angle = positions.to(torch.float32)[..., None] * theta**-exponent
    return torch.polar(torch.ones_like(angle), angle)[..., None, :]


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, T, H, D] by `rotations`; as in Meta's Llama, with products
    in float32 at least; angles are float32.

    Pairs are neighbours (2n, 2n+1); Hugging Face's Llama pairs (n, n + D/2), which is a permutation of
    the projections' rows that import and export apply.
    """
    pairs = torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).type_as(x)
