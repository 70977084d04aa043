"""Sigmoid attention (arXiv 2409.04431; for sinks: 2410.10781, §6)."""

import torch
from torch import Tensor

from sinkbed.kernels.normalizers import NORMALIZERS, Fused, Linearized, Normalizer, normalize, total_of
from sinkbed.ranges import check_number


@NORMALIZERS.register("sigmoid")
class Sigmoid(Normalizer):
    """sigmoid(logit + bias), a weight for each key by itself; `normalized` divides by their sum."""

    def __init__(self, heads: int, *, normalized: bool = False, bias: float = 0.0) -> None:
        check_number("model.decoder.normalizer.sigmoid.bias", bias)
        self.normalized, self.bias = normalized, bias
        self.triton = Fused("sigmoid", normalized, bias or None)

    def weights(self, logits: Tensor) -> Tensor:
        weights = (logits + self.bias if self.bias else logits).sigmoid()
        return normalize(weights) if self.normalized else weights

    def linearized(self, logits: Tensor) -> Linearized:
        weights = (logits.add_(self.bias) if self.bias else logits).sigmoid_()

        def pullback(d_weights: Tensor, d_total: Tensor | None) -> tuple[Tensor, ...]:
            if d_total is not None:
                d_weights += d_total
            return (torch.ops.aten.sigmoid_backward(d_weights, weights),)

        return Linearized(weights, total_of(weights) if self.normalized else None, pullback)
