"""LayerNorm (arXiv 1607.06450)."""

import torch.nn.functional as F
from torch import Tensor, nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.norms import NORMS


@NORMS.register("layer")
class LayerNorm(nn.LayerNorm):
    """torch's, over the width of the residual stream; in float32 at least, as a CPU's kernel for half precision sums
    the weight's gradient over the rows in that."""

    def __init__(self, config: DecoderConfig, *, bias: bool = True) -> None:
        super().__init__(config.d_model, eps=config.norm_eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype.itemsize > 2:
            return super().forward(x)
        weight, offset = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, offset, self.eps).to(x.dtype)
