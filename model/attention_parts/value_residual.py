"""Value residual (arXiv 2410.17897): later layers see the first layer's values."""

import torch
from torch import Tensor, nn

from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.config import DecoderConfig


@ATTENTION_PARTS.register("value_residual")
class ValueResidual(nn.Module, AttentionPart):
    """(1 − share) · v + share · v₁, with a learned share a layer that starts at a half."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        if config.n_layers == 1:
            raise ValueError(
                "model.decoder.attention_parts: expected more layers than one beside value_residual, which gives the "
                "values of the first to the others, got n_layers 1"
            )
        self.share = nn.Parameter(torch.full((1,), 0.5)) if layer else None

    def values(self, v: Tensor, x: Tensor, left: dict[str, Tensor]) -> Tensor:
        if self.share is None:
            left["first_values"] = v
            return v
        return torch.lerp(v, left["first_values"], self.share.to(v.dtype))
