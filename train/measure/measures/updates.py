"""What heads write: nothing, one vector to every token, or something to each (no-op and broadcast sinks)."""

from dataclasses import dataclass
from typing import Any

import torch

from sinkbed.model.observe import LayerAttention
from sinkbed.train.measure.excerpts import Excerpts, Totals
from sinkbed.train.measure.measures import Column, of_heads, register_measure
from sinkbed.train.measure.measures.rank import singular_values


@dataclass(frozen=True, kw_only=True)
class Updates:
    """[L][H], of what a head gives to the queries t > 0: the rows of A V."""

    norm: list[list[float]]
    """Mean norm over that of the values: near 0 for a head that rests on a key without a value (a no-op)."""
    stable_rank: list[list[float]]
    """‖A V‖²_F / ‖A V‖²_2: near 1 where every token is given the same (a broadcast)."""
    from_first: list[list[float]]
    """Norm of what comes from key 0 over that of all, mean over queries."""


@register_measure(
    "updates",
    group="states",
    while_training=False,
    columns=(
        Column("norm", "‖AV‖ / ‖v‖", "state/update_norm/layer{layer}/{mode}", of_heads),
        Column("stable_rank", "stable rank of AV", "state/update_stable_rank/layer{layer}/{mode}", of_heads),
        Column("from_first", "of it from key 0", "state/update_from_first/layer{layer}/{mode}", of_heads),
    ),
    note="AV: what a head gives to the queries t > 0, mean over heads: its norm over that of values, its stable "
    "rank ‖AV‖²F / ‖AV‖²₂ (1: every token is given the same), and the norm of what comes from key 0 over it.",
)
def measure_updates(model: Any, excerpts: Excerpts, batch_tokens: int) -> Updates:
    """Measure a model on documents in one inference mode; see `Updates`."""
    totals = Totals(len(excerpts.rows))

    def attention(seen: LayerAttention) -> None:
        v = seen.v.float().repeat_interleave(seen.q.shape[1] // seen.v.shape[1], 1)
        blocks = [(weights @ v, weights[..., 0]) for _, weights in seen.blocks(normalized=False)]
        given, on_first = (torch.cat(parts, 2)[:, :, 1:] for parts in zip(*blocks, strict=True))
        norms = given.norm(dim=-1)
        totals.add("norm", seen.layer, norms.mean(-1) / v.norm(dim=-1).mean(-1).clamp_min(1e-8))
        first = on_first * v[:, :, 0].norm(dim=-1, keepdim=True)
        totals.add("from_first", seen.layer, (first / norms.clamp_min(1e-8)).mean(-1))
        squares = singular_values(given.flatten(0, 1).double()).square().view(*given.shape[:2], -1)
        totals.add("stable_rank", seen.layer, squares.sum(-1) / squares.amax(-1).clamp_min(1e-16))

    excerpts.read(model, batch_tokens, attention=attention)
    return Updates(**totals.means())
