"""Gradients of gradients, which a fused backward pass has none of."""

from typing import Any, NoReturn

import torch


def refuse_second_backward(operator: str) -> None:
    """Have the operator of a backward pass say so where it is differentiated itself."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "attention: expected one backward pass, got one through its gradients; implementation='reference' has those"
        )

    torch.library.register_autograd(operator, refuse)
