"""Where forms written by hand pay.

On a CPU the composite forms of a block's parts cost as much as a matrix product at small widths, so each has a form
with few passes over memory; tests hold them to the plain definitions, forward and gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_eager_cpu(x: Tensor) -> bool:
    """Whether the forms written for CPUs apply; the compiler and accelerators fuse the plain ones better, and
    autocast must see the plain operators."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
