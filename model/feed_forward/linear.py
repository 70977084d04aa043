"""One matrix: a feed-forward that cannot act on a token by itself but linearly (arXiv 2603.05498)."""

from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.feed_forward import FEED_FORWARDS


@FEED_FORWARDS.register("linear")
class Linear(nn.Module):
    """down(x), a square matrix; d_ff is 0."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.down(x)
