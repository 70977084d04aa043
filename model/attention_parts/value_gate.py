"""A gate on the values (arXiv 2505.06708, position G2): the key says how much of it can be read."""

from torch import Tensor, nn

from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.config import DecoderConfig


@ATTENTION_PARTS.register("value_gate")
class ValueGate(nn.Module, AttentionPart):
    """v · sigmoid(gate(x)), element by element."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.key_heads * config.dim, bias=False)

    def values(self, v: Tensor, x: Tensor, left: dict[str, Tensor]) -> Tensor:
        return v * self.gate(x).sigmoid().view_as(v)
