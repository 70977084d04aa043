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


class Linearized(NamedTuple):
    """A normaliser at some logits [B, H, M, T], for one that takes its derivative by hand."""

    weights: Tensor
    """[B, H, M, T], the weights of the keys, not yet divided by `total`."""
    total: Tensor | None
    """[B, H, M, 1], what the weights of a query are divided by; None: 1. Dividing the output saves a pass over T."""
    pullback: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]
    """Takes the gradients of `weights` and `total` to that of the logits and of each of `parameters` that requires one.
    It is called once, and may write over the first of them and over what it keeps."""


class Normalizer:
    """What takes the place of the softmax. It is made from the number of heads; one with weights is an `nn.Module` too.

    The implementations `reference` and `torch` take any; `triton` takes those that say how it computes them.

    Where the weights of a query do not add up to 1, its sink mass is the first key's weight over their sum
    (as arXiv 2410.10781, §6, reads it); the weight as it is, the *raw* mass, is measured too.
    """

    triton: Fused | None = None
    """None: the Triton kernels lack it."""
    hidden_logit = float("-inf")
    """What `linearized` is given for a hidden key: a logit that has no weight, and no part in those of others."""

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "register_parameter") and cls.parameters is Normalizer.parameters:
            raise TypeError(
                f"{cls.__name__}: expected nn.Module before Normalizer among its bases, as its weights would not be "
                "trained, got it after"
            )

    def weights(self, logits: Tensor) -> Tensor:
        """Weights [B, H, M, N], none negative, of N ≤ T keys for M queries; logits [B, H, M, N]: −inf hides a key.

        N grows from block to block and says nothing: the keys that a query sees are those above −inf. Multiplied by a
        parameter, a hidden one has a gradient that is no number: hide it anew (`masked_fill`) where there is one.
        """
        raise NotImplementedError

    def parameters(self) -> Iterable[Tensor]:
        """Its own weights; an `nn.Module` has this already."""
        return ()

    def linearized(self, logits: Tensor) -> Linearized:
        """The weights, and how gradients go back through them; a variant may have a quicker form than this one.

        It may write over the logits, which are `hidden_logit` where a key is hidden.
        """
        import torch

        with torch.enable_grad():
            inputs = (logits.detach().requires_grad_(), *(p for p in self.parameters() if p.requires_grad))
            weights = self.weights(inputs[0])

        def pullback(d_weights: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
            return torch.autograd.grad(weights, inputs, d_weights, allow_unused=True, materialize_grads=True)

        return Linearized(weights.detach(), None, pullback)


def check_weights(normalizer: Normalizer, heads: int) -> None:
    """Raise ValueError for weights that are no finite numbers of at least 0, and for a hidden key that has some."""
    import torch

    logits = torch.tensor([-2.0, 0.0, 2.0, float("-inf")]).repeat(1, heads, 1, 1)
    with torch.no_grad():
        weights = normalizer.weights(logits.clone())
    if weights.is_meta:
        return
    right = weights.shape == logits.shape and bool(weights.isfinite().all()) and bool((weights >= 0).all())
    if not right or bool(weights[..., -1].any()):
        raise ValueError(
            f"normalizer {type(normalizer).__name__}: expected finite weights of at least 0, and 0 for the hidden key, "
            f"got {weights.flatten().tolist()[:4]} of the logits [-2, 0, 2, -inf]"
        )


def total_of(weights: Tensor) -> Tensor:
    """[..., 1], what weights are divided by to add up to 1; none of them is negative."""
    return weights.sum(-1, keepdim=True) + 1e-8


def normalize(weights: Tensor) -> Tensor:
    """Weights over their sum along the keys; all 0 where there is none."""
    return weights / total_of(weights)
