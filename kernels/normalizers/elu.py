"""ELU plus one in the softmax's place (arXiv 2410.10781, §6)."""

from torch import Tensor

from sinkbed.kernels.normalizers import NORMALIZERS, Fused, Linearized, Normalizer, normalize, total_of


@NORMALIZERS.register("elu")
class ELU(Normalizer):
    """elu(logit) + 1: exp(logit) below 0, logit + 1 above; `normalized` divides by the sum."""

    def __init__(self, heads: int, *, normalized: bool = False) -> None:
        self.normalized = normalized
        self.triton = Fused("elu", normalized)

    def weights(self, logits: Tensor) -> Tensor:
        weights = logits.clamp(max=0).exp() + logits.relu()  # elu(logit) + 1 rounds small weights to 0
        return normalize(weights) if self.normalized else weights

    def linearized(self, logits: Tensor) -> Linearized:
        slope = logits.clamp(max=0).exp_()
        weights = logits.relu_().add_(slope)

        def pullback(d_weights: Tensor, d_total: Tensor | None) -> tuple[Tensor, ...]:
            if d_total is not None:
                d_weights += d_total
            return (d_weights.mul_(slope),)

        return Linearized(weights, total_of(weights) if self.normalized else None, pullback)
