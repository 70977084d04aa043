"""SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's statistics."""

import torch

from sinkbed.ranges import check_number
from sinkbed.train.loop import extra_optimizers
from sinkbed.train.loop.optim import OptimizerConfig, check_betas, groups_by_place
from sinkbed.train.loop.optimizers import OPTIMIZERS


@OPTIMIZERS.register("soap")
class SOAP(extra_optimizers.SOAP):
    """pytorch-optimizer's. The longer side of embeddings and output matrix, most often the vocabulary's,
    stays as it is.

    `betas` and `eps` are Adam's; the bases are computed anew every `frequency` steps. The first step only gathers
    statistics. Each matrix keeps two square ones for each side, so FSDP2, which cuts matrices, is refused.
    """

    state_tensors, shards = 10, False  # two moments, and two square matrices a side

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimizerConfig,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        frequency: int = 10,
    ) -> None:
        betas = check_betas("model.optimizer.name.soap.betas", betas)
        check_number("model.optimizer.name.soap.eps", eps, above=0)
        check_number("model.optimizer.name.soap.frequency", frequency, least=1)
        blocks, *rest = groups_by_place(model, config)
        width = max((min(p.shape) for group in rest for p in group["params"] if p.ndim > 1), default=1)
        groups = [blocks, *({**group, "max_precondition_dim": width} for group in rest)]
        super().__init__(groups, lr=config.lr, betas=betas, eps=eps, precondition_frequency=frequency)
