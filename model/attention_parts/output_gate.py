"""A gate on what attention gives (arXiv 2505.06708): the query itself says how much of it is wanted."""

from torch import Tensor, nn

from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.config import DecoderConfig
from sinkbed.ranges import check_choice, check_number


@ATTENTION_PARTS.register("output_gate")
class OutputGate(nn.Module, AttentionPart):
    """o · sigmoid(gate(x)), a gate for each `per`: element of a head, or head.

    `inputs` says how many of x's first channels the gate reads; 0 is all.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, per: str = "element", inputs: int = 0) -> None:
        super().__init__()
        check_choice("model.decoder.attention_parts.output_gate.per", per, ("element", "head"))
        check_number("model.decoder.attention_parts.output_gate.inputs", inputs, least=0, most=config.d_model)
        self.inputs = inputs or config.d_model
        self.shape = (config.n_heads, config.dim if per == "element" else 1)
        self.gate = nn.Linear(self.inputs, self.shape[0] * self.shape[1], bias=False)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return o * self.gate(x[..., : self.inputs]).sigmoid().unflatten(-1, self.shape)
