"""The gradient of the loss at the first token's hidden states against that at the others' (arXiv 2603.17771)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sinkbed.model.observe import evaluating, input_device
from sinkbed.train.measure.excerpts import Excerpts, Totals, hidden_states
from sinkbed.train.measure.inputs import counted_targets, target_nll
from sinkbed.train.measure.measures import Column, register_measure


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradient of a document's summed loss with respect to the hidden states (arXiv 2603.17771)."""

    norm: list[list[float]]
    """[L+1][T] norm of the gradient at h_t."""
    ratio: list[float]
    """[L+1] at h_0 over the mean of the others; 0 where that at h_0 is 0."""


@register_measure(
    "gradients",
    group="states",
    columns=(Column("ratio", "‖∂h₀‖ / ‖∂hₜ‖", "state/gradient_ratio/layer{layer}/{mode}"),),
    note="‖∂h₀‖/‖∂hₜ‖: gradient of the loss, at the first token over the mean of the others; 0 where no counted "
    "target depends on the first token's state, as after the last attention.",
    differentiates=True,
)
def measure_gradients(model: Any, excerpts: Excerpts, batch_tokens: int) -> Gradients:
    """Gradients of the loss at each token's hidden states; leaves the gradients of the weights alone."""
    totals = Totals(len(excerpts.rows))
    with evaluating(model):
        for text, row in excerpts.batches(input_device(model), batch_tokens):
            states, (nll, _) = hidden_states(model, partial(target_nll, model, row, text))
            counted = counted_targets(text, torch.full((len(text),), text.shape[1]), excerpts.strategy)
            loss = nll[counted.to(nll.device)].sum()
            for layer, gradient in enumerate(torch.autograd.grad(loss, states)):
                norms = gradient.float().norm(dim=-1)
                totals.add("norm", layer, norms)
                first, others = norms[:, 0], norms[:, 1:].mean(-1)
                totals.add("ratio", layer, (first / others).masked_fill(first == 0, 0.0))
    return Gradients(**totals.means())
