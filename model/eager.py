"""Where forms written by hand pay.

On a CPU the composite forms of a block's parts cost as much as a matrix product at small widths, so each has a form
with few passes over memory; tests hold them to the plain definitions, forward and gradient.
"""

import torch
from torch import Tensor


def is_eager_cpu(x: Tensor) -> bool:
    """Whether the forms written for CPUs apply; the compiler and accelerators fuse the plain ones better."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products with x are taken in: autocast's (`trainer.precision: bf16-mixed`), or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
