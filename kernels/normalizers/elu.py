"""ELU plus one in the softmax's place (arXiv 2410.10781, §6)."""

import torch.nn.functional as F
from torch import Tensor

from sinkbed.kernels.normalizers import NORMALIZERS, Fused, Normalizer, shares


@NORMALIZERS.register("elu")
class ELU(Normalizer):
    """elu(logit) + 1: exp(logit) below 0, logit + 1 above; `normalized` divides by the sum."""

    def __init__(self, heads: int, *, normalized: bool = False) -> None:
        self.normalized = normalized
        self.triton = Fused("elu", normalized)

    def weights(self, logits: Tensor) -> Tensor:
        weights = F.elu(logits) + 1
        return shares(weights) if self.normalized else weights
