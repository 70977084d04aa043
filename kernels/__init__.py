"""Causal attention over packed rows, with sink statistics: a function of (q, k, v, mask).

This package knows nothing of data or models. `attention` validates and dispatches; `reference` is the
dense oracle; each implementation lives in its own module and never imports another.
"""

from kernels.api import AttentionOutput, Implementation, Statistics, attention, available
from kernels.mask import Mask, interval_mask

__all__ = [
    "AttentionOutput",
    "Implementation",
    "Mask",
    "Statistics",
    "attention",
    "available",
    "interval_mask",
]
