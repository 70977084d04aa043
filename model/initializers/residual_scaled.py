"""Matrices that write to the residual stream are drawn smaller, so that its size does not grow with depth (GPT-2)."""

import math
from collections.abc import Callable

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.initializers import INITIALIZERS, WRITES_RESIDUAL


@INITIALIZERS.register("residual_scaled")
def residual_scaled(config: DecoderConfig) -> Callable[[str, Tensor], float]:
    """init_std, and init_std / √(2L) for what writes to the residual stream."""
    smaller = config.init_std / math.sqrt(2 * config.n_layers)
    return lambda name, matrix: smaller if name.endswith(WRITES_RESIDUAL) else config.init_std
