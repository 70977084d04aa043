"""The same for every matrix (BERT, GPT-1)."""

from collections.abc import Callable

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.initializers import INITIALIZERS


@INITIALIZERS.register("normal")
def normal(config: DecoderConfig) -> Callable[[str, Tensor], float]:
    """init_std."""
    return lambda name, matrix: config.init_std
