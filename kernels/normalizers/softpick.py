"""Softpick (arXiv 2504.20966): a softmax that can give nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

from sinkbed.kernels.normalizers import NORMALIZERS, Fused, Normalizer
from sinkbed.ranges import check_number


@NORMALIZERS.register("softpick")
class Softpick(Normalizer):
    """relu(exp(logit) − 1) / Σ |exp(logit) − 1|: keys of logits below 0 take no weight, and no part in the sum of them.

    As in the paper's code, the exponentials are taken from the largest logit and `eps` is added to the sum.
    """

    def __init__(self, heads: int, *, eps: float = 1e-8) -> None:
        check_number("model.decoder.normalizer.softpick.eps", eps, above=0)
        self.eps = eps
        self.triton = Fused("softpick", eps=eps)

    def weights(self, logits: Tensor) -> Tensor:
        largest = logits.amax(-1, keepdim=True).detach()  # cancels, but for eps
        shifted = (logits - largest).exp() - (-largest).exp()
        total = shifted.abs().masked_fill(logits == float("-inf"), 0.0).sum(-1, keepdim=True)
        return shifted.relu() / (total + self.eps)

    def linearized(self, logits: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        # Where a logit is 0 nothing is given and nothing added to the sum: hidden keys may as well have that.
        logits.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=0.0)
        largest = logits.amax(-1, keepdim=True)
        exponential = logits.sub_(largest).exp_()
        shifted = exponential - (-largest).exp()
        total = torch.linalg.vector_norm(shifted, 1, dim=-1, keepdim=True).add_(self.eps)
        weights = shifted.relu().div_(total)

        def pullback(d_weights: Tensor) -> tuple[Tensor, ...]:
            mean = torch.linalg.vecdot(weights, d_weights)[..., None]
            d_weights = d_weights.mul_(weights.sign()).sub_(shifted.sign().mul_(mean))
            return (d_weights.mul_(exponential).div_(total),)

        return weights, pullback
