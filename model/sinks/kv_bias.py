"""A learned key and value a head (KV bias; arXiv 2402.17762; 2410.10781, §6)."""

import torch
from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.sinks import SINKS
from sinkbed.model.sinks.k_bias import KBias


@SINKS.register("kv_bias")
class KVBias(KBias):
    """As `k_bias`, with a value."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.v = nn.Parameter(torch.zeros(config.n_heads * config.dim))

    def key(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        logit, _ = super().key(q)
        return logit, self.v.to(q.dtype).view(q.shape[1], -1)
