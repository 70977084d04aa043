"""The network: one Llama-like decoder whose variants are small parts chosen by config.

Importing it does not import torch: the command line reads `model.config`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkbed.model.config import DecoderConfig
    from sinkbed.model.decoder import Decoder, DecoderOutput

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sinkbed.model' has no attribute {name!r}")
    return getattr(import_module("sinkbed.model." + ("config" if name == "DecoderConfig" else "decoder")), name)
