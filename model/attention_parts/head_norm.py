"""RMSNorm on what each head gives (arXiv 2605.06611)."""

import torch
from torch import Tensor, nn

from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.config import DecoderConfig
from sinkbed.model.norms.rms import rms_norm


@ATTENTION_PARTS.register("head_norm")
class HeadNorm(nn.Module, AttentionPart):
    """o / √(mean(o²) + eps) · weight over each head's D: a head can no longer give little by resting on a key of a
    small value."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim))

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return rms_norm(o, self.weight, self.eps)
