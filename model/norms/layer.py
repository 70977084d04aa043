"""LayerNorm (arXiv 1607.06450)."""

from torch import nn

from sinkbed.model.config import DecoderConfig
from sinkbed.model.norms import NORMS


@NORMS.register("layer")
def layer_norm(config: DecoderConfig, *, bias: bool = True) -> nn.LayerNorm:
    """torch's, over the width of the residual stream."""
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=bias)
