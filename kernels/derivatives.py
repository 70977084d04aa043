"""Derivatives that the fused operators have none of, and what they say where they are asked for."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raise NotImplementedError for a tensor with a tangent: below autograd none is seen, and it would be 0."""
    inside = forward_ad._current_level >= 0
    if inside and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            "attention: expected derivatives in reverse mode, got one in forward mode; implementation='reference' has "
            "those"
        )


def refuse_second_backward(operator: str) -> None:
    """Have the operator of a backward pass say so where it is differentiated itself."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "attention: expected one backward pass, got one through its gradients; implementation='reference' has those"
        )

    torch.library.register_autograd(operator, refuse)
