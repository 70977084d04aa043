"""Whether the model knows where position 0 is: the same state there, whatever the token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkbed.train.measure.excerpts import Excerpts, Totals
from sinkbed.train.measure.measures import Column, register_measure


@dataclass(frozen=True, kw_only=True)
class Constancy:
    """[L+1] mean cosine of the hidden states of different documents at one row position."""

    first: list[float]
    """At position 0."""
    others: list[float]
    """Mean over the other positions."""


@register_measure(
    "constancy",
    group="states",
    while_training=False,
    columns=(
        Column("first", "cos of h₀", "state/constancy_first/layer{layer}/{mode}"),
        Column("others", "cos of hₜ", "state/constancy_others/layer{layer}/{mode}"),
    ),
    note="cos of h₀, hₜ: mean cosine of the hidden states of two documents at position 0, and at another; with the "
    "same token at position 0 it is 1 there.",
)
def measure_constancy(model: Any, excerpts: Excerpts, batch_tokens: int) -> Constancy:
    """Measure a model on at least two documents in one inference mode; see `Constancy`.

    Raises ValueError for fewer.
    """
    count = len(excerpts.rows)
    if count < 2:
        raise ValueError(f"constancy: expected at least two documents, got {count}; raise --mixing_documents")
    totals = Totals(1)

    def hidden(layer: int, h: Tensor) -> None:
        totals.add("sum", layer, torch.nn.functional.normalize(h.double(), dim=-1).sum(0, keepdim=True))

    excerpts.read(model, batch_tokens, hidden=hidden)
    # Of N unit vectors, ‖Σ u‖² = N + N (N − 1) · the mean cosine of two of them.
    sums = torch.tensor(totals.means()["sum"]).square().sum(-1)  # [L+1, T]
    cosines = (sums - count) / (count * (count - 1))
    return Constancy(first=cosines[:, 0].tolist(), others=cosines[:, 1:].mean(-1).tolist())
