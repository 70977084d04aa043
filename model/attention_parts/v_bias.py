"""A learned vector added to what each head gives (V bias; arXiv 2410.10781, §6)."""

import torch
from torch import Tensor, nn

from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.config import DecoderConfig


@ATTENTION_PARTS.register("v_bias")
class VBias(nn.Module, AttentionPart):
    """o + bias [H, D]; no key has it, so no attention goes to it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.n_heads * config.dim))  # a vector: no decay

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return o + self.bias.to(o.dtype).view(o.shape[2:])
