"""Causal attention over packed rows, with sink statistics: a function of (q, k, v, mask).

This package knows nothing of data or models. `attention` validates and dispatches; `reference` is the
dense oracle; each implementation lives in its own module and never imports another.

Importing it does not import torch: the command line reads the names of `normalizers`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkbed.kernels.api import AttentionOutput, Implementation, attention, attention_received, available
    from sinkbed.kernels.mask import Mask, interval_mask
    from sinkbed.kernels.statistics import Statistics, TopSinks, mean_received, top_sinks

__all__ = [
    "AttentionOutput",
    "Implementation",
    "Mask",
    "Statistics",
    "TopSinks",
    "attention",
    "attention_received",
    "available",
    "interval_mask",
    "mean_received",
    "top_sinks",
]

_HOME = {
    **dict.fromkeys(("Mask", "interval_mask"), "sinkbed.kernels.mask"),
    **dict.fromkeys(("Statistics", "TopSinks", "mean_received", "top_sinks"), "sinkbed.kernels.statistics"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sinkbed.kernels' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "sinkbed.kernels.api")), name)
