"""Lion (arXiv 2302.06675): the sign of a momentum, so that every weight moves by the learning rate."""

import torch

from sinkbed.train.loop import extra_optimizers
from sinkbed.train.loop.optim import OptimizerConfig, check_betas, parameter_groups
from sinkbed.train.loop.optimizers import OPTIMIZERS


@OPTIMIZERS.register("lion")
class Lion(extra_optimizers.Lion):
    """pytorch-optimizer's. `betas` weigh the momentum in the step and in what is kept of it.

    Its learning rate is a third to a tenth of AdamW's, its weight decay as many times larger.
    """

    state_tensors, shards = 1, True

    def __init__(
        self, model: torch.nn.Module, config: OptimizerConfig, *, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        betas = check_betas("model.optimizer.name.lion.betas", betas)
        super().__init__(parameter_groups(model, config), lr=config.lr, betas=betas)
