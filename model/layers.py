"""What feed-forwards are made of: two or three matrices around an activation."""

from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig


class FeedForward(nn.Module):
    """down(activate(up(x))) without biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def activate(self, x: Tensor) -> Tensor:
        """The activation, [..., F] -> [..., F]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.down(self.activate(self.up(x)))


class GatedFeedForward(FeedForward):
    """down(activate(gate(x)) · up(x)) without biases (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.down(self.activate(self.gate(x)) * self.up(x))
