"""A learned key a head whose value is zero (K bias; arXiv 2410.10781, §6)."""

import torch
from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.sinks import SINKS, Sink


@SINKS.register("k_bias")
class KBias(nn.Module, Sink):
    """Logit q·k / √D of queries as attention has them, with RoPE the rotated ones; the key has no position."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.zeros(config.n_heads * config.dim))  # a vector: it starts at 0, without decay

    def key(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        at_least = torch.promote_types(q.dtype, torch.float32)  # as the logits of tokens
        k = self.k.to(at_least).view(q.shape[1], 1, -1) * q.shape[-1] ** -0.5
        return (q.to(at_least) * k).sum(-1), None  # no matrix product, which autocast would round
