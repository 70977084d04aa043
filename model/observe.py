"""Looking into a forward pass: hidden states between the blocks, and what each layer's attention was given and made.

Works alike on our decoder and on a model of `transformers` (`model.hf.adapter`). Nothing is kept of a layer but what
the callbacks keep, so that memory is theirs to bound.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkbed.kernels import Implementation, Mask, Statistics, attention_received
from sinkbed.kernels.scoring import Scoring
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
    lse: Tensor | None
    """[B, H, T], log-sum-exp of the logits, the learned sink included; None with a normaliser."""
    mask: Mask
    scoring: Scoring
    statistics: Statistics | None
    implementation: Implementation | None = None
    """Of the operator; None: that of the device."""

    def blocks(self, size: int = 128, *, normalized: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """Slices of queries and their attention [B, H, M, T], so that T×T is never there at once.

        Args:
            normalized: with a normaliser, over the sum of the query's, which it may leave at another value than 1.
        """
        for queries in blocks_of(self.q.shape[2], size):
            logits = self.scoring.logits(self.q, self.k.float(), self.mask, queries)  # in float32
            if self.scoring.normalizer is not None:
                weights = self.scoring.normalizer.weights(logits)
                yield queries, over_sum(weights) if normalized else weights
            else:
                assert self.lse is not None
                yield queries, (logits - self.lse[:, :, queries, None].float()).exp()

    def received(self) -> Tensor:
        """[B, H, T] attention that each key receives, summed over queries."""
        if self.scoring.is_plain and self.lse is not None:
            return attention_received(
                self.q, self.k, self.lse, self.mask, scale=self.scoring.scale, implementation=self.implementation
            )
        start = self.q.new_zeros(self.q.shape[:3], dtype=torch.float32)
        return sum((block.sum(2) for _, block in self.blocks()), start)


def over_sum(weights: Tensor) -> Tensor:
    """[..., T] over their sum; all 0 where that is 0."""
    total = weights.sum(-1, keepdim=True)
    return (weights / total).masked_fill(total == 0, 0.0)


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
            registers = getattr(model, "registers", None)
            count = 0 if registers is None else len(registers)
            for handle in _hidden_hooks(model.blocks, _of_tokens(hidden, count) if count else hidden):
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


def _of_tokens(hidden: Hidden, count: int) -> Hidden:
    """The same callback for rows that begin with so many registers, of which it knows nothing."""

    def call(layer: int, h: Tensor) -> Tensor:
        registers, tokens = h[:, :count], h[:, count:]
        replaced = hidden(layer, tokens)
        # Always put back: what the callback keeps must be what the next block reads, to differentiate by it.
        return torch.cat([registers, tokens if replaced is None else replaced], dim=1)

    return call


def _hidden_hooks(blocks: nn.ModuleList, hidden: Hidden) -> Iterator[Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:  # given by its name
            (name,) = (name for name in ("hidden_states", "x") if name in kwargs)
            replaced = hidden(0, kwargs[name])
            return None if replaced is None else (args, {**kwargs, name: replaced})
        replaced = hidden(0, args[0])
        return None if replaced is None else ((replaced, *args[1:]), kwargs)

    def after(layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        is_tensor = isinstance(output, Tensor)
        replaced = hidden(layer, output if is_tensor else output[0])
        return replaced if is_tensor or replaced is None else (replaced, *output[1:])

    yield blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    for layer, block in enumerate(blocks, 1):
        yield block.register_forward_hook(partial(after, layer))
