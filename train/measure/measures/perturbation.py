"""How far a changed token reaches into the others (arXiv 2504.02732, Figure 2)."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinkbed.model.observe import evaluating, input_device, observing
from sinkbed.train.measure.excerpts import Excerpts, Totals
from sinkbed.train.measure.measures import Column, register_measure


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One token of each text is replaced by another: what changes. n tokens of text; first tokens are left out."""

    position: int
    """Of the replaced token, in the text."""
    change: list[list[float]]
    """[L+1][n] norm of the change of the hidden state."""
    relative: list[list[float]]
    """[L+1][n] the same over the layer's mean norm of hidden states, but for the first token of the text."""
    spread: list[float]
    """[L+1] mean of `relative` over the tokens after the (last) replaced one."""
    across: list[float]
    """[L+1] standard error of `spread` over documents; 0 with one."""


@register_measure(
    "perturbation",
    group="mixing",
    columns=(
        Column("spread", "perturbation spread", "mixing/perturbation/{mode}", error="across"),
        Column("across", "± documents"),
    ),
    note="Perturbation spread: one token of the text (position n/4) replaced, mean change of the hidden states "
    "after it, over the mean norm of the tokens but the first. ±: standard error over documents.",
)
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
    totals, device = Totals(len(text)), input_device(model)
    size = max(1, batch_tokens // (text.shape[1] + 1) // 2)
    with evaluating(model):
        for at in range(0, len(text), size):
            chosen = slice(at, at + size)
            both = torch.cat([text[chosen], changed[chosen]])
            twice = replace(excerpts, rows=2 * excerpts.rows[chosen], text=both)
            _, row = twice.batch(slice(None), device)

            def hidden(layer: int, h: Tensor, slots: Tensor = row.slots) -> None:
                before, after = h[:, slots.to(h.device)].float().chunk(2)
                change = (after - before).norm(dim=-1)
                totals.add("change", layer, change)
                # Without the first token: where it is the sink, its norm is many times that of the others.
                relative = change / before[:, 1:].norm(dim=-1).mean(-1, keepdim=True)
                totals.add("relative", layer, relative)
                after = relative[:, end:]
                spread = after.mean(-1) if after.shape[1] else torch.zeros(len(after), device=after.device)
                totals.add("spread", layer, spread)
                totals.add("spread²", layer, spread.double().square())

            with observing(model, hidden=hidden):
                model(row.tokens, mask=row.mask, logits=False)
    means = totals.means()
    pairs = zip(means["spread"], means.pop("spread²"), strict=True)
    variance = (max(0.0, s - m * m) / max(1, len(text) - 1) for m, s in pairs)
    return Perturbation(position=position, across=[math.sqrt(v) for v in variance], **means)


def _other_tokens(excerpts: Excerpts, tokens: Tensor) -> Tensor:
    """Ordinary tokens in place of others, each a function of the document's number; [N] -> [N]."""
    ordinary = excerpts.probe.ordinary_ids
    where = {token: index for index, token in enumerate(ordinary)}
    # Knuth's multiplicative hash spreads neighbouring numbers; a step of 1 to V−1 never ends at the same token.
    steps = [(row + 1) * 2_654_435_761 % 2**32 % (len(ordinary) - 1) + 1 for row in excerpts.rows]
    old = [where[int(token)] for token in tokens]
    return torch.tensor([ordinary[(at + step) % len(ordinary)] for at, step in zip(old, steps, strict=True)])
