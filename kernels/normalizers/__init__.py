"""Normalisers, a file each: how the logits of a query become the weights of the values."""

from __future__ import annotations

from torch import Tensor

from sinkbed.registry import Registry

NORMALIZERS = Registry("model.decoder.normalizer", __name__)


class Normalizer:
    """What takes the place of the softmax. It is made from the number of heads; one with weights is an `nn.Module` too.

    Implementations other than `reference`, which takes any, refuse it.
    """

    def weights(self, logits: Tensor) -> Tensor:
        """Weights [B, H, M, T] of the keys for M of the queries; logits [B, H, M, T] are −inf where a key is hidden."""
        raise NotImplementedError
