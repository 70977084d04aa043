"""The softmax, which every implementation has."""

from sinkbed.kernels.normalizers import NORMALIZERS


@NORMALIZERS.register("softmax")
def softmax(heads: int) -> None:
    """No normaliser: weights are exp(logits − lse), the learned sink beside them."""
