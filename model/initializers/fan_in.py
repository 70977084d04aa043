"""By the number of inputs (LeCun): what a matrix gives is as large as what it reads."""

from collections.abc import Callable

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.initializers import INITIALIZERS, WRITES_RESIDUAL


@INITIALIZERS.register("fan_in")
def fan_in(config: DecoderConfig) -> Callable[[str, Tensor], float]:
    """1 / √inputs, over √(2L) for what writes to the residual stream; all outside the blocks has init_std."""

    def std(name: str, matrix: Tensor) -> float:
        if "blocks." not in name:
            return config.init_std
        return (matrix.shape[1] * (2 * config.n_layers if name.endswith(WRITES_RESIDUAL) else 1)) ** -0.5

    return std
