"""The network: one Llama-like decoder whose variants are small parts chosen by config.

Importing it does not import torch: the command line reads `model.config`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkbed.model.config import DecoderConfig
    from sinkbed.model.decoder import Decoder, DecoderOutput

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput"]

_HOME = {
    "Decoder": "sinkbed.model.decoder",
    "DecoderConfig": "sinkbed.model.config",
    "DecoderOutput": "sinkbed.model.decoder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sinkbed.model' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
