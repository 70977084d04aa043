"""ALiBi (arXiv 2108.12409): logits fall with the distance, at a slope a head that is fixed."""

import torch
from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import POSITIONS, PositionEncoding


@POSITIONS.register("alibi")
class ALiBi(nn.Module, PositionEncoding):
    """−slope · (i − j) on the logit of query i and key j."""

    of_heads: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.register_buffer("of_heads", slopes_of(config.n_heads), persistent=False)

    @property
    def slopes(self) -> Tensor:
        return self.of_heads


def slopes_of(heads: int) -> Tensor:
    """[H]: 2^(−8h/H) for h = 1 to H. For other H than a power of two, as in the paper's code, those of the power
    below, then every other one of the power above."""
    power = 2 ** (heads.bit_length() - 1)
    below = torch.arange(1, power + 1) * (-8 / power)
    above = (2 * torch.arange(heads - power) + 1) * (-4 / power)
    return torch.cat([below, above]).exp2()
