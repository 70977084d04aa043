"""Softpick (arXiv 2504.20966): a softmax that can give nothing."""

import torch
from torch import Tensor

from sinkbed.kernels.normalizers import NORMALIZERS, Fused, Linearized, Normalizer
from sinkbed.ranges import check_number

_LARGEST = 32.0
"""Logits are lowered to this at most: sums of their exponentials, and gradients divided by them, stay in range."""


@NORMALIZERS.register("softpick")
class Softpick(Normalizer):
    """relu(exp(logit) − 1) / Σ |exp(logit) − 1|: keys of logits below 0 take no weight, and no part in the sum of them.

    As in the paper's code, `eps` is added to the sum of exponentials that are taken from the largest logit.
    """

    hidden_logit = 0.0

    def __init__(self, heads: int, *, eps: float = 1e-8) -> None:
        check_number("model.decoder.normalizer.softpick.eps", eps, above=0)
        self.eps = eps
        self.triton = Fused("softpick", eps=eps)

    def weights(self, logits: Tensor) -> Tensor:
        largest = logits.amax(-1, keepdim=True).detach()  # cancels, but for eps
        shifted = (logits - largest).exp() - (-largest).exp()
        total = shifted.abs().masked_fill(logits == float("-inf"), 0.0).sum(-1, keepdim=True)
        return shifted.relu() / (total + self.eps)

    def linearized(self, logits: Tensor) -> Linearized:
        largest = logits.amax(-1, keepdim=True)
        shift = (largest - _LARGEST).clamp_(min=0)  # cancels: only the range of exponentials asks for it
        if torch.compiler.is_compiling() or bool(shift.any()):
            logits -= shift
        exponential = logits.exp_()
        shifted = exponential - (-shift).exp()
        weights = shifted.relu()
        absolute = 2 * weights.sum(-1, keepdim=True) - shifted.sum(-1, keepdim=True)
        total = absolute + self.eps * (largest - shift).exp()  # eps in the scale of these exponentials

        def pullback(d_weights: Tensor, d_total: Tensor | None) -> tuple[Tensor, ...]:
            assert d_total is not None
            d_absolute = exponential.mul_(shifted.sign_())  # of the sum of absolute values
            return (d_weights.mul_(d_absolute.clamp(min=0)).addcmul_(d_absolute, d_total),)

        return Linearized(weights, total, pullback)
