"""Learned positions (GPT-2): a vector a position, added to the embedded token."""

from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import POSITIONS, PositionEncoding
from sinkbed.ranges import check_number


@POSITIONS.register("learned")
class Learned(nn.Module, PositionEncoding):
    """x + table[position]; there are `length` positions."""

    def __init__(self, config: DecoderConfig, *, length: int = 2048) -> None:
        super().__init__()
        check_number("model.decoder.position.learned.length", length, least=1)
        self.max_length = length
        self.table = nn.Embedding(length, config.d_model)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table(positions)
