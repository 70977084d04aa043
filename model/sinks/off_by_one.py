"""Softmax-off-by-one: a logit of 0 for good, exp(x) / (1 + Σ exp(x))."""

import torch
from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.sinks import SINKS, Sink


@SINKS.register("off_by_one")
class OffByOne(nn.Module, Sink):
    """The logit of 0 has no weight and no value."""

    zeros: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(config.n_heads), persistent=False)

    def key(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.zeros, None
