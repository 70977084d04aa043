"""AdamW (arXiv 1711.05101)."""

import torch

from sinkbed.ranges import check_number
from sinkbed.train.loop.optim import OptimizerConfig, check_betas, parameter_groups
from sinkbed.train.loop.optimizers import OPTIMIZERS


@OPTIMIZERS.register("adamw")
class AdamW(torch.optim.AdamW):
    """torch's, fused.

    `betas` are the decay rates of the moments, `eps` is added to the root of the second.
    """

    state_tensors, shards = 2, True

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimizerConfig,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        betas = check_betas("model.optimizer.name.adamw.betas", betas)
        check_number("model.optimizer.name.adamw.eps", eps, above=0)
        groups = parameter_groups(model, config)
        super().__init__(groups, lr=config.lr, betas=betas, eps=eps, fused=True)
