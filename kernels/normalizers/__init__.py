"""Normalisers, a file each: how the logits of a query become the weights of the values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from sinkbed.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

NORMALIZERS = Registry("model.decoder.normalizer", __name__)


class Fused(NamedTuple):
    """A normaliser as the Triton kernels compute it."""

    name: str
    """In `kernels.triton.scoring`."""
    normalized: bool = False
    """Whether its weights are divided by their sum."""
    bias: float | None = None
    """Added to the logits."""
    eps: float = 1e-8
    """Added to what weights are divided by."""


class Normalizer:
    """What takes the place of the softmax. It is made from the number of heads; one with weights is an `nn.Module` too.

    The implementations `reference` and `torch` take any; `triton` takes those that say how it computes them.

    Where the weights of a query do not add up to 1, "sink" has two readings, and both are measured: the *mass* on the
    first key is its weight as it is, the *share* is that weight over the sum of the query's weights
    (arXiv 2410.10781, §6, reads the share).
    """

    triton: Fused | None = None
    """None: the Triton kernels lack it."""

    def weights(self, logits: Tensor) -> Tensor:
        """Weights [B, H, M, T] of the keys for M of the queries; logits [B, H, M, T] are −inf where a key is hidden."""
        raise NotImplementedError

    def parameters(self) -> Iterable[Tensor]:
        """Its own weights; an `nn.Module` has this already."""
        return ()

    def linearized(self, logits: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """The weights, and what takes a gradient of theirs to that of the logits and of each of `parameters` that
        requires one.

        A variant may have a quicker form than this one, which may write over the logits and the gradient it is given.
        """
        import torch

        with torch.enable_grad():
            inputs = (logits.detach().requires_grad_(), *(p for p in self.parameters() if p.requires_grad))
            weights = self.weights(inputs[0])

        def pullback(d_weights: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(weights, inputs, d_weights, allow_unused=True, materialize_grads=True)

        return weights.detach(), pullback


def shares(weights: Tensor) -> Tensor:
    """Weights, none negative, over their sum along the keys; all 0 where there is none."""
    return weights / (weights.sum(-1, keepdim=True) + 1e-8)
