"""Sinusoidal positions (arXiv 1706.03762, §3.5)."""

import torch
from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import POSITIONS, PositionEncoding
from sinkbed.ranges import check_number


@POSITIONS.register("sinusoidal")
class Sinusoidal(PositionEncoding):
    """x + scale · (sin, cos)(position · 10000^(−2n/C)), sines in the even channels.

    Embeddings are drawn with `init_std`, far smaller than a sine, so the default scale makes both alike; 1 is the
    paper's, whose embeddings are multiplied by √C.
    """

    def __init__(self, config: DecoderConfig, *, scale: float | None = None) -> None:
        self.channels = config.d_model
        self.scale = config.init_std if scale is None else scale
        check_number("model.decoder.position.sinusoidal.scale", self.scale, above=0)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        exponent = torch.arange(0, self.channels, 2, dtype=torch.float32, device=positions.device) / self.channels
        angle = positions.to(torch.float32)[..., None] * 10_000**-exponent
        waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., : self.channels]
        return x + (self.scale * waves).type_as(x)
