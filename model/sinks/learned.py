"""A learned logit a head that joins the softmax without a value (gpt-oss, arXiv 2508.10925)."""

import torch
from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.sinks import SINKS, Sink


@SINKS.register("learned")
class Learned(nn.Module, Sink):
    """The same logit for every query of a head; it starts at 0."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_heads))

    def key(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.weight, None
