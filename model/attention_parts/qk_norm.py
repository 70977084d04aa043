"""QK-norm (arXiv 2010.04245), as in Qwen 3: queries and keys are normalised, so that logits are bounded."""

import torch
from torch import Tensor, nn

from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.config import DecoderConfig
from sinkbed.model.norms.rms import rms_norm


@ATTENTION_PARTS.register("qk_norm")
class QKNorm(nn.Module, AttentionPart):
    """RMSNorm over each head's D, before positions, with one weight for queries and one for keys."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.eps = [config.n_heads, config.key_heads], config.norm_eps
        self.query_weight = nn.Parameter(torch.ones(config.dim))
        self.key_weight = nn.Parameter(torch.ones(config.dim))

    def queries_keys(self, q_k: Tensor) -> Tensor:
        q, k = q_k.split(self.heads, dim=2)
        return torch.cat([rms_norm(q, self.query_weight, self.eps), rms_norm(k, self.key_weight, self.eps)], dim=2)
