"""Mixing: how far a token's representation reaches into the others', and what the sink does to it.

The claim of arXiv 2504.02732 is that a sink keeps representations from over-mixing. Readings of it: the spread of a
perturbation (its Figure 2), the bound on the Jacobian ∂v_j^(l) / ∂v_i^(0) that the attention alone gives (Theorem 3.2;
the Jacobian itself is in `train.jacobian`), and how near the representations are to each other (rank collapse; the
distance of the last two).

v^(l) are the hidden states of layer l; l = 0 is what the first block reads. Every document is cropped to one length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkbed.model.observe import LayerAttention, evaluating, input_device, observing
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.states import Excerpts, Totals


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One token of each text is replaced by another: what changes. n tokens of text; first tokens are left out."""

    position: int
    """Of the replaced token, in the text."""
    change: list[list[float]]
    """[L+1][n] norm of the change of the hidden state."""
    relative: list[list[float]]
    """[L+1][n] the same over the layer's mean norm of hidden states."""
    spread: list[float]
    """[L+1] mean of `relative` over the tokens after the (last) replaced one."""
    across: list[float]
    """[L+1] standard error of `spread` over documents; 0 with one."""


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


@torch.no_grad()
def measure_perturbation(
    model: Any, excerpts: Excerpts, batch_tokens: int, *, position: int | None = None, changed: Tensor | None = None
) -> Perturbation:
    """Replace one token of each text and compare hidden states.

    Args:
        position: of the token in the text; None: a quarter of the way.
        changed: [N, n] the texts after the change, where another token than one drawn by document number is wanted.
    """
    text = excerpts.text
    if changed is None:
        position = text.shape[1] // 4 if position is None else position
        changed = text.clone()
        changed[:, position] = _other_tokens(excerpts, text[:, position])
    differing = (changed != text).any(0).nonzero().flatten()
    position, end = (int(differing[0]), int(differing[-1]) + 1) if len(differing) else (0, 1)
    totals, device, done = Totals(), input_device(model), 0
    size = max(1, batch_tokens // (text.shape[1] + 1) // 2)
    with evaluating(model):
        for at in range(0, len(text), size):
            chosen = slice(at, at + size)
            both = torch.cat([text[chosen], changed[chosen]])
            rows = excerpts.rows[chosen]
            twice = Excerpts(excerpts.probe, excerpts.mode, excerpts.strategy, rows + rows, both)
            _, row = twice.batch(slice(None), device)

            def hidden(layer: int, h: Tensor, slots: Tensor = row.slots) -> None:
                before, after = h[:, slots.to(h.device)].float().chunk(2)
                change = (after - before).norm(dim=-1)
                totals.add("change", layer, change)
                relative = change / before.norm(dim=-1).mean(-1, keepdim=True)
                totals.add("relative", layer, relative)
                after = relative[:, end:]
                spread = after.mean(-1) if after.shape[1] else torch.zeros(len(after), device=after.device)
                totals.add("spread", layer, spread)
                totals.add("spread²", layer, spread.double().square())

            with observing(model, hidden=hidden):
                model(row.tokens, mask=row.mask)
            done += len(rows)
    spread, squares = totals.means("spread", done), totals.means("spread²", done)
    variance = (max(0.0, s - m * m) / max(1, done - 1) for m, s in zip(spread, squares, strict=True))
    perturbation = Perturbation(
        position=position,
        change=totals.means("change", done),
        relative=totals.means("relative", done),
        spread=spread,
        across=[math.sqrt(v) for v in variance],
    )
    return finite(perturbation, f"perturbation, mode {excerpts.mode}")


def _other_tokens(excerpts: Excerpts, tokens: Tensor) -> Tensor:
    """Ordinary tokens in place of others, each a function of the document's number; [N] -> [N]."""
    probe = excerpts.probe
    usable = [t for t in range(len(probe.token_bytes)) if t not in probe.special_ids]
    where = {token: index for index, token in enumerate(usable)}
    # Knuth's multiplicative hash spreads neighbouring numbers; a step of 1 to V−1 never ends at the same token.
    steps = [(row + 1) * 2_654_435_761 % 2**32 % (len(usable) - 1) + 1 for row in excerpts.rows]
    old = [where[int(token)] for token in tokens]
    return torch.tensor([usable[(at + step) % len(usable)] for at, step in zip(old, steps, strict=True)])


@torch.no_grad()
def measure_rank(model: Any, excerpts: Excerpts, batch_tokens: int) -> dict[str, Rank]:
    """`row`: of all tokens of a row. `rest`: without the first, whose norm can hide the others."""
    totals, done = Totals(), 0

    def hidden(layer: int, h: Tensor) -> None:
        for part, v in (("row", h.float()), ("rest", h[:, 1:].float())):
            whole = v.flatten(1).norm(dim=-1)
            distance = (v - v.mean(1, keepdim=True)).flatten(1).norm(dim=-1)
            s = _singular_values(v.double())
            last = (v[:, -1] - v[:, -2]).norm(dim=-1)
            for name, value in (
                ("distance", distance),
                ("relative_distance", distance / whole),
                ("effective_rank", torch.special.entr(s / s.sum(-1, keepdim=True)).sum(-1).exp()),
                ("matrix_entropy", torch.special.entr(s.square() / s.square().sum(-1, keepdim=True)).sum(-1)),
                ("last_distance", last),
                ("relative_last_distance", last / v[:, -2:].norm(dim=-1).mean(-1)),
            ):
                totals.add(f"{part}/{name}", layer, value)

    with evaluating(model):
        for text, row in excerpts.batches(input_device(model), batch_tokens):
            with observing(model, hidden=hidden):
                model(row.tokens, mask=row.mask)
            done += len(text)
    ranks = {
        part: Rank(**{name: totals.means(f"{part}/{name}", done) for name in Rank.__dataclass_fields__})
        for part in ("row", "rest")
    }
    return finite(ranks, f"rank, mode {excerpts.mode}")


def _singular_values(v: Tensor) -> Tensor:
    """[B, min(T, C)] of v [B, T, C] in float64, by the smaller Gram matrix: a third of the time of an SVD. The relative
    error of 1e-8 that the squares leave to values far below the largest is nothing to an entropy."""
    gram = v @ v.transpose(1, 2) if v.shape[1] <= v.shape[2] else v.transpose(1, 2) @ v
    if not bool(gram.isfinite().all()):  # the solver would not end; the result is refused by its name
        return torch.full(gram.shape[:2], math.nan)
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


@torch.no_grad()
def measure_paths(model: Any, excerpts: Excerpts, batch_tokens: int) -> Paths:
    """The sum over causal paths of Theorem 3.2 (arXiv 2504.02732), as a product of matrices: no path is enumerated."""
    totals, done = Totals(), 0
    product = torch.empty(0)
    heads = int(model.config.n_heads)

    def attention(seen: LayerAttention) -> None:
        nonlocal product
        B, H, T = seen.q.shape[:3]
        if seen.layer == 0:
            product = torch.eye(T, dtype=torch.float64).expand(B, T, T)
        below, product = product.to(seen.q.device), torch.empty(B, T, T, dtype=torch.float64, device=seen.q.device)
        for queries, probabilities in seen.blocks():
            product[:, queries] = probabilities.double().sum(1) @ below + below[:, queries] / H
        product /= H + 1 / H
        totals.add("share", seen.layer, product[:, -1])
        totals.add("first", seen.layer, product[:, -1, 0])
        share = product[:, -1] / product[:, -1].sum(-1, keepdim=True)
        totals.add("sources", seen.layer, torch.special.entr(share).sum(-1).exp())

    with evaluating(model):
        for text, row in excerpts.batches(input_device(model), batch_tokens):
            with observing(model, attention=attention):
                model(row.tokens, mask=row.mask)
            done += len(text)
    paths = Paths(
        share=totals.means("share", done),
        first=totals.means("first", done),
        sources=totals.means("sources", done),
        log10_factor=int(model.config.n_layers) * math.log10(heads + 1 / heads),
    )
    return finite(paths, f"paths, mode {excerpts.mode}")
