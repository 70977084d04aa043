"""No learned sink."""

from sinkbed.model.config import DecoderConfig
from sinkbed.model.sinks import SINKS


@SINKS.register("none")
def none(config: DecoderConfig) -> None:
    """Queries have the keys of tokens alone."""
