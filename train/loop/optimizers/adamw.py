"""AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from typing import Any

import torch

from sinkbed.train.loop.optim import OptimizerConfig
from sinkbed.train.loop.optimizers import OPTIMIZERS


@OPTIMIZERS.register("adamw")
class AdamW(torch.optim.AdamW):
    """torch's, fused, with the moments' decay rates and eps of the config."""

    state_tensors = 2

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
