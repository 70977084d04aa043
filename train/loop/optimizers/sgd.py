"""Stochastic gradient descent with momentum."""

from collections.abc import Callable
from typing import Any

import torch

from sinkbed.ranges import check_number
from sinkbed.train.loop.optim import OptimizerConfig, parameter_groups
from sinkbed.train.loop.optimizers import OPTIMIZERS


@OPTIMIZERS.register("sgd")
class SGD(torch.optim.SGD):
    """torch's, b = momentum · b + g, w = (1 − lr · weight_decay) · w − lr · b.

    Unlike torch's, its decay is decoupled as that of the other optimizers.
    """

    state_tensors, shards = 1, True

    def __init__(
        self, model: torch.nn.Module, config: OptimizerConfig, *, momentum: float = 0.9, nesterov: bool = False
    ) -> None:
        check_number("model.optimizer.name.sgd.momentum", momentum, least=0, below=1)
        if nesterov and not momentum:
            raise ValueError("model.optimizer.name.sgd.nesterov: expected momentum beside it, got 0; set one of them")
        groups = [{"params": g["params"], "decay": g["weight_decay"]} for g in parameter_groups(model, config)]
        super().__init__(groups, lr=config.lr, momentum=momentum, nesterov=nesterov, foreach=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if group["params"]:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decay"])
        super().step()
        return loss
