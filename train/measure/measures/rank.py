"""How near the representations of a text are to one another: rank collapse, and the distance of the last two."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkbed.train.measure.excerpts import Excerpts, Totals
from sinkbed.train.measure.measures import Column, Layers, register_measure


@dataclass(frozen=True, kw_only=True)
class Rank:
    """How near the representations of a text are to one another, per layer; n tokens."""

    distance: list[float]
    """[L+1] ‖V − (1/n) 1 1ᵀ V‖_F; 0 is rank collapse."""
    relative_distance: list[float]
    """[L+1] the same over ‖V‖_F."""
    effective_rank: list[float]
    """[L+1] exp of the entropy of the singular values over their sum (Roy and Vetterli, 2007)."""
    matrix_entropy: list[float]
    """[L+1] entropy, nats, of the squared singular values over their sum (arXiv 2510.06477)."""
    last_distance: list[float]
    """[L+1] ‖v_n − v_{n−1}‖; 0 is representational collapse."""
    relative_last_distance: list[float]
    """[L+1] the same over the mean norm of the two."""


def _rest(result: Any, key: str) -> Layers:
    return list(result["rest"][key])


@register_measure(
    "rank",
    group="mixing",
    columns=(
        Column("relative_distance", "rank distance", "mixing/rank_distance/layer{layer}/{mode}", _rest),
        Column("effective_rank", "effective rank", "mixing/effective_rank/layer{layer}/{mode}", _rest),
        Column("matrix_entropy", "matrix entropy", read=_rest),
        Column("relative_last_distance", "last distance", "mixing/last_distance/layer{layer}/{mode}", _rest),
    ),
    note="Rank distance: ‖V − mean‖/‖V‖; effective rank: exp of the entropy of the singular values; matrix "
    "entropy: of their squares, nats; last distance: ‖vₙ − vₙ₋₁‖ over their norm; all without the first token, 0 "
    "is collapse.",
)
def measure_rank(model: Any, excerpts: Excerpts, batch_tokens: int) -> dict[str, Rank]:
    """`row`: of all tokens of a row. `rest`: without the first, whose norm can hide the others."""
    totals = {part: Totals(len(excerpts.rows)) for part in ("row", "rest")}

    def hidden(layer: int, h: Tensor) -> None:
        for part, v in (("row", h.float()), ("rest", h[:, 1:].float())):
            norm = v.flatten(1).norm(dim=-1)
            distance = (v - v.mean(1, keepdim=True)).flatten(1).norm(dim=-1)
            s = singular_values(v.double())
            last = (v[:, -1] - v[:, -2]).norm(dim=-1)
            for name, value in (
                ("distance", distance),
                ("relative_distance", distance / norm),
                ("effective_rank", torch.special.entr(s / s.sum(-1, keepdim=True)).sum(-1).exp()),
                ("matrix_entropy", torch.special.entr(s.square() / s.square().sum(-1, keepdim=True)).sum(-1)),
                ("last_distance", last),
                ("relative_last_distance", last / v[:, -2:].norm(dim=-1).mean(-1)),
            ):
                totals[part].add(name, layer, value)

    excerpts.read(model, batch_tokens, hidden=hidden)
    return {part: Rank(**of_part.means()) for part, of_part in totals.items()}


def singular_values(v: Tensor) -> Tensor:
    """[B, min(T, C)] of v [B, T, C] in float64, by the smaller Gram matrix: a third of the time of an SVD. The relative
    error of 1e-8 that the squares leave to values far below the largest is nothing to an entropy."""
    gram = v @ v.transpose(1, 2) if v.shape[1] <= v.shape[2] else v.transpose(1, 2) @ v
    if not bool(gram.isfinite().all()):  # the solver would not end; the result is refused by its name
        return torch.full(gram.shape[:2], math.nan)
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
