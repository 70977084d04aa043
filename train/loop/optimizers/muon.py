"""Muon (arXiv 2502.16982): steps of weight matrices are orthogonal."""

from collections.abc import Callable
from typing import Any

import torch

from sinkbed.ranges import check_number
from sinkbed.train.loop.optim import OptimizerConfig, check_betas, groups_by_place
from sinkbed.train.loop.optimizers import OPTIMIZERS


@OPTIMIZERS.register("muon")
class Muon(torch.optim.Optimizer):
    """torch's Muon for the weight matrices of blocks, its AdamW for embeddings, output matrix and vectors.

    Muon's steps are scaled to the size of AdamW's, so both have one learning rate and weight decay. `momentum` is
    Muon's, `betas` and `eps` are AdamW's.
    """

    state_tensors, shards = 2, True  # matrices of blocks keep one

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimizerConfig,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        check_number("model.optimizer.name.muon.momentum", momentum, least=0, below=1)
        betas = check_betas("model.optimizer.name.muon.betas", betas)
        check_number("model.optimizer.name.muon.eps", eps, above=0)
        matrices, *rest = groups_by_place(model, config)
        muon = torch.optim.Muon([matrices], lr=config.lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(rest, lr=config.lr, betas=betas, eps=eps, fused=True)
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each; groups and state, which a checkpoint replaces, are this optimizer's."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, groups in zip(self.parts, (self.param_groups[:1], self.param_groups[1:]), strict=True):
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss
