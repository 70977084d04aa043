"""QK-norm (arXiv 2010.04245), as in Qwen 3: queries and keys are normalised, so that logits are bounded."""

import torch
from torch import Tensor, nn

from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.config import DecoderConfig
from sinkbed.model.norms.rms import head_rms_norm


@ATTENTION_PARTS.register("qk_norm")
class QKNorm(nn.Module, AttentionPart):
    """RMSNorm over each head's D, before positions, with one weight for queries and one for keys."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.eps = [config.n_heads, config.key_heads], config.norm_eps
        self.query_weight = nn.Parameter(torch.ones(config.dim))
        self.key_weight = nn.Parameter(torch.ones(config.dim))

    def queries_keys(self, q_k: Tensor) -> Tensor:
        weights = zip((self.query_weight, self.key_weight), self.heads, strict=True)
        return head_rms_norm(q_k, torch.cat([weight.expand(heads, -1) for weight, heads in weights]), self.eps)
