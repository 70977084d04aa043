"""The bound on the Jacobian ∂v_j^(l) / ∂v_i^(0) that the attention alone gives (arXiv 2504.02732, Theorem 3.2)."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from sinkbed.model.observe import LayerAttention
from sinkbed.train.measure.excerpts import Excerpts, Totals
from sinkbed.train.measure.measures import Column, of_attention, register_measure


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The sum over paths of Theorem 3.2, from the attention of all layers below, into the last token j.

    Π_l Ā^(l) with Ā^(l) = Σ_h A^(l,h) + I / H, each layer divided by its row sum H + 1/H; a row of the product then
    holds the share of the bound that each source has (less than 1 in all where learned sinks take a part).
    """

    share: list[list[float]]
    """[L][T] share of source i after layers 1 to l."""
    first: list[float]
    """[L] share of the first token."""
    sources: list[float]
    """[L] effective number of sources, exp of the entropy of the shares."""
    log10_factor: float
    """Decimal logarithm of (H + 1/H)^L, what the shares after the last layer are to be multiplied with."""


@register_measure(
    "paths",
    group="mixing",
    columns=(
        Column("first", "paths from key 0", "mixing/paths_from_first_key/{mode}", of_attention),
        Column("sources", "path sources", "mixing/path_sources/{mode}", of_attention),
    ),
    note="Paths: share of Theorem 3.2's bound (arXiv 2504.02732) into the last token that starts at key 0, and "
    "effective number of sources; with a normaliser of weights over their sum, which is no bound then.",
)
def measure_paths(model: Any, excerpts: Excerpts, batch_tokens: int) -> Paths:
    """The sum over causal paths of Theorem 3.2 (arXiv 2504.02732), as a product of matrices: no path is enumerated."""
    totals = Totals(len(excerpts.rows))
    product = torch.empty(0)
    heads = int(model.config.n_heads)

    def attention(layer: LayerAttention) -> None:
        nonlocal product
        B, H, T = layer.q.shape[:3]
        if layer.layer == 0:
            product = torch.eye(T, dtype=torch.float64).expand(B, T, T)
        below, product = product.to(layer.q.device), torch.empty(B, T, T, dtype=torch.float64, device=layer.q.device)
        for queries, weights in layer.blocks():
            product[:, queries] = weights.double().sum(1) @ below + below[:, queries] / H
        product /= H + 1 / H
        totals.add("share", layer.layer, product[:, -1])
        totals.add("first", layer.layer, product[:, -1, 0])
        share = product[:, -1] / product[:, -1].sum(-1, keepdim=True)
        totals.add("sources", layer.layer, torch.special.entr(share).sum(-1).exp())

    excerpts.read(model, batch_tokens, attention=attention)
    return Paths(**totals.means(), log10_factor=int(model.config.n_layers) * math.log10(heads + 1 / heads))
