"""Self-attention: the projections around `kernels.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sinkbed.kernels import AttentionOutput, Implementation, Mask, Statistics, attention
from sinkbed.kernels.normalizers import NORMALIZERS, Normalizer
from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import PositionEncoding


class Operator(nn.Module):
    """`kernels.attention` as a module without weights: hooks see what it is given and what it makes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, **options: Any) -> AttentionOutput:
        """See `kernels.attention`."""
        return attention(q, k, v, mask, **options)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with a position encoding and an optional learned sink."""

    def __init__(self, config: DecoderConfig, position: PositionEncoding) -> None:
        super().__init__()
        self.config = config
        self._rotate = position.rotate  # a method, not a module of this layer's own: one encoding serves all layers
        heads = config.n_heads + 2 * config.key_heads
        self.qkv = nn.Linear(config.d_model, heads * config.dim, bias=False)
        self.out = nn.Linear(config.n_heads * config.dim, config.d_model, bias=False)
        self.operator = Operator()
        self.normalizer: Normalizer | None = NORMALIZERS.make(config.normalizer, config.n_heads)
        self.sink_logit: Tensor | None
        if config.sink == "learned":
            self.sink_logit = nn.Parameter(torch.zeros(config.n_heads))
        else:
            fixed = torch.zeros(config.n_heads) if config.sink == "off_by_one" else None
            self.register_buffer("sink_logit", fixed, persistent=False)

    def forward(
        self,
        x: Tensor,
        prepared: Any,
        mask: Mask | None,
        *,
        statistics: bool,
        implementation: Implementation | None,
    ) -> tuple[Tensor, Statistics | None]:
        """x [B, T, C] -> [B, T, C], and the statistics [B, H, T] when asked for."""
        c = self.config
        q_k, v = self.qkv(x).unflatten(-1, (-1, c.dim)).split([c.n_heads + c.key_heads, c.key_heads], dim=2)
        q, k = self._rotate(q_k, prepared).split([c.n_heads, c.key_heads], dim=2)
        out = self.operator(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            mask,
            sink_logit=self.sink_logit,
            normalizer=self.normalizer,
            statistics=statistics,
            implementation=implementation,
        )
        return self.out(out.output.transpose(1, 2).flatten(2)), out.statistics
