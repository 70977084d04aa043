"""No positions (NoPE, arXiv 2305.19466): the causal mask alone tells them."""

from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import POSITIONS, PositionEncoding


@POSITIONS.register("none")
def none(config: DecoderConfig) -> PositionEncoding:
    """An encoding that does nothing."""
    return PositionEncoding()
