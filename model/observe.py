"""Looking into a forward pass: hidden states between the blocks, and what each layer's attention was given and made.

Works alike on our decoder and on a model of `transformers` (`model.hf.adapter`). Nothing is kept of a layer but what
the callbacks keep, so that memory is theirs to bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinkbed.kernels import Mask, Statistics, attention_received
from sinkbed.kernels.normalizers import Normalizer
from sinkbed.kernels.statistics import blocks_of


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """One layer's attention. B rows, H query heads, Hkv key heads, T positions, D head dim."""

    layer: int
    q: Tensor
    """[B, H, T, D], rotated."""
    k: Tensor
    """[B, Hkv, T, D], rotated."""
    v: Tensor
    """[B, Hkv, T, D]."""
    lse: Tensor
    """[B, H, T], log-sum-exp of the logits, the learned sink included."""
    mask: Mask
    scale: float
    softcap: float | None
    """Logits are softcap · tanh(logits / softcap) where set."""
    statistics: Statistics | None
    normalizer: Normalizer | None = None
    """What takes the softmax's place; None is the softmax."""

    def logits(self, queries: slice) -> Tensor:
        """[B, H, M, T] float32 logits of M of the queries, −inf where hidden."""
        B, H, _, D = self.q.shape
        grouped = self.q[:, :, queries].float().reshape(B, self.k.shape[1], -1, D)
        logits = (grouped @ self.k.float().transpose(2, 3)).view(B, H, -1, self.k.shape[2]) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.masked_fill(~self.mask.visible(self.q.device, queries), float("-inf"))

    def blocks(self, size: int = 128) -> Iterator[tuple[slice, Tensor]]:
        """Slices of queries and their attention [B, H, M, T], so that T×T is never there at once."""
        for queries in blocks_of(self.q.shape[2], size):
            logits = self.logits(queries)
            if self.normalizer is None:
                yield queries, (logits - self.lse[:, :, queries, None].float()).exp()
            else:
                yield queries, self.normalizer.weights(logits)

    def received(self) -> Tensor:
        """[B, H, T] attention that each key receives, summed over queries."""
        if self.softcap is None and self.normalizer is None:
            return attention_received(self.q, self.k, self.lse, self.mask, scale=self.scale)
        return sum((block.sum(2) for _, block in self.blocks()), torch.zeros_like(self.lse, dtype=torch.float32))


Attentions = Callable[[LayerAttention], None]
Hidden = Callable[[int, Tensor], Tensor | None]


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: with its first weights, or on a CPU where these are fetched from disk."""
    first = next(model.parameters()).device
    return torch.device("cpu") if first.type == "meta" else first


@contextmanager
def observing(model: Any, *, attention: Attentions | None = None, hidden: Hidden | None = None) -> Iterator[None]:
    """Watch the forward passes made inside.

    Args:
        model: our `Decoder`, or `model.hf.adapter.HFModel`.
        attention: is given each layer's attention, from the first layer to the last.
        hidden: is given (l, h [B, T, C]): the first block's input for l = 0, block l's output for l = 1 to L. What it
            returns, if anything, takes the place of h.
    """
    with ExitStack() as stack:
        # Compiled code does not look for hooks that came after it.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if hidden is not None:
            for handle in _hidden_hooks(model.blocks, hidden):
                stack.callback(handle.remove)
        if attention is not None:
            stack.enter_context(model.observed(attention))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _hidden_hooks(blocks: nn.ModuleList, hidden: Hidden) -> Iterator[Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:  # given by its name
            (name,) = (name for name in ("hidden_states", "x") if name in kwargs)
            replaced = hidden(0, kwargs[name])
            return None if replaced is None else (args, {**kwargs, name: replaced})
        replaced = hidden(0, args[0])
        return None if replaced is None else ((replaced, *args[1:]), kwargs)

    def after(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            whole = isinstance(output, Tensor)
            replaced = hidden(layer, output if whole else output[0])
            if replaced is None:
                return None
            return replaced if whole else (replaced, *output[1:])

        return hook

    yield blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    for index, block in enumerate(blocks):
        yield block.register_forward_hook(after(index + 1))
