"""Causal attention over packed rows, with sink statistics: a function of (q, k, v, mask).

This package knows nothing of data or models. `attention` validates and dispatches; `reference` is the
dense oracle; each implementation lives in its own module and never imports another.
"""

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
