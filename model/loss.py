"""Cross-entropy of the output matrix's logits, without keeping the logits.

The gradient of the logits is known as soon as they are (softmax minus one-hot), so the forward pass goes
on to the gradients of hidden states and weights and lets a block of logits go before the next: memory is
one block instead of N × V twice, and the backward pass is a multiplication. The idea is Liger's fused
linear cross-entropy (arXiv 2410.10989) in plain PyTorch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sinkbed.model.eager import product_dtype

IGNORED = -100
BLOCK_LOGITS = 2**25
"""Logits of one block, at most: 128 MB in float32. Compiled, a block has an eighth of the rows at least."""
_NEAR_LOGITS, _FEWEST_ROWS, _COMPILED_BLOCKS = 2**21, 512, 8  # of `_rows`: measured on CPUs


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        counted = targets != IGNORED
        share = counted / counted.sum().clamp_min(1)
        index = targets.masked_fill(~counted, 0)[:, None]
        loss = hidden.new_zeros(())
        weight = weight.to(product_dtype(hidden))
        d_hidden = torch.empty_like(hidden, dtype=weight.dtype)
        d_weight: Tensor | None = None
        rows = _rows(hidden, len(weight))
        for h, t, s, dh in zip(
            hidden.split(rows), index.split(rows), share.split(rows), d_hidden.split(rows), strict=True
        ):
            h = h.to(weight.dtype)
            logits = (h @ weight.T).float()
            logits -= logits.amax(-1, keepdim=True)
            target = logits.gather(1, t)[:, 0]
            total = logits.exp_().sum(-1)  # one exponential serves the loss and its gradient
            loss += torch.dot(total.log() - target, s)
            d_logits = logits.mul_((s / total)[:, None]).scatter_add_(1, t, -s[:, None]).to(weight.dtype)
            torch.mm(d_logits, weight, out=dh)
            if d_weight is None:
                d_weight = (d_logits.T @ h).float()
            elif d_logits.dtype == torch.float32:
                d_weight.addmm_(d_logits.T, h)
            else:  # whose sums of many blocks would lose digits
                d_weight += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None


def _rows(hidden: Tensor, vocab_size: int) -> int:
    """Rows of a block: on a CPU few, so that their logits stay near a core, but enough for products to be fast.

    A compiler writes out every block, so it is given `_COMPILED_BLOCKS` at most.
    """
    rows = BLOCK_LOGITS // vocab_size
    if hidden.device.type == "cpu":
        rows = min(rows, max(_NEAR_LOGITS // vocab_size, _FEWEST_ROWS))
    if torch.compiler.is_compiling():
        rows = max(rows, -(-len(hidden) // _COMPILED_BLOCKS))
    return max(rows, 1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of the targets that count; 0 when none does.

    Compiled for a CPU, another number of blocks is another graph: it is for batches of one size.

    Args:
        hidden: [N, C], float32 for the blockwise form; weight: [V, C], the output matrix.
        targets: [N] token ids; `IGNORED` does not count.
    """
    kind = hidden.device.type
    plain = kind != "cpu" and (torch.compiler.is_compiling() or torch.is_autocast_enabled(kind))
    if plain or hidden.dtype != torch.float32:
        loss = F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORED, reduction="sum")
        return loss / (targets != IGNORED).sum().clamp_min(1)
    return _LinearCrossEntropy.apply(hidden, weight, targets)


@torch.compiler.disable
def token_nll(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Negative log-likelihood of each target [B, T], in nats, 0 where it is `IGNORED`; a block of logits at a time.

    Args:
        head: [n, C] -> logits [n, V]; called again in the backward pass.
        hidden: [B, T, C]; targets: [B, T] token ids.
    """

    def of_block(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h).float()
        return F.cross_entropy(logits, t.to(logits.device), ignore_index=IGNORED, reduction="none")

    size = max(1, BLOCK_LOGITS // vocab_size)
    call = partial(checkpoint, of_block, use_reentrant=False) if torch.is_grad_enabled() else of_block
    blocks = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    return torch.cat([call(h, t) for h, t in blocks]).view_as(targets)
