"""Sigmoid attention (arXiv 2409.04431; for sinks: 2410.10781, §6)."""

from collections.abc import Callable

import torch
from torch import Tensor

from sinkbed.kernels.normalizers import NORMALIZERS, Fused, Normalizer, shares
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
        return shares(weights) if self.normalized else weights

    def linearized(self, logits: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        if self.normalized:
            return super().linearized(logits)
        weights = self.weights(logits)
        return weights, lambda d_weights: (torch.ops.aten.sigmoid_backward(d_weights, weights),)
