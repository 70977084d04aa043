"""Where the attention goes: to the first key, and what a query looks at instead."""

from dataclasses import dataclass
from typing import Any

import torch

from sinkbed.model.observe import LayerAttention, evaluating, input_device, observing, over_sum
from sinkbed.train.measure.excerpts import Excerpts, Totals
from sinkbed.train.measure.measures import Column, of_heads, register_measure

_FIRST_QUERY = 3
"""From here on the classes of keys are apart: 0, 1, t − 1 and t."""
_FREQUENT = 10


@dataclass(frozen=True, kw_only=True)
class Destinations:
    """[L][H] shares of what queries t ≥ 3 give to tokens; together 1, but 0 for a query that gives nothing."""

    first: list[list[float]]
    """On key 0."""
    second: list[list[float]]
    """On key 1."""
    previous: list[list[float]]
    """On the token before."""
    itself: list[list[float]]
    """On the query's own token."""
    delimiters: list[list[float]]
    """On other keys that are punctuation or white space."""
    frequent: list[list[float]]
    """On other keys whose token is one of the ten most frequent ones of the texts."""
    elsewhere: list[list[float]]
    """On the rest."""


@register_measure(
    "destinations",
    group="states",
    while_training=False,
    columns=tuple(
        Column(key, f"on {title}", f"state/attention_{key}/layer{{layer}}/{{mode}}", of_heads)
        for key, title in (
            ("first", "key 0"),
            ("second", "key 1"),
            ("previous", "token before"),
            ("itself", "itself"),
            ("delimiters", "delimiters"),
            ("frequent", "frequent tokens"),
            ("elsewhere", "the rest"),
        )
    ),
    note="On …: share of what the queries from the fourth on give to tokens, mean over heads. Delimiters: other keys "
    "that are punctuation or white space. Frequent tokens: keys of no other class whose token is one of the ten most "
    "frequent ones of the texts.",
)
@torch.no_grad()
def measure_destinations(model: Any, excerpts: Excerpts, batch_tokens: int) -> Destinations:
    """Measure a model on documents in one inference mode; see `Destinations`."""
    totals = Totals(len(excerpts.rows))
    ids, counts = excerpts.text.unique(return_counts=True)
    kinds = (
        torch.tensor(sorted(excerpts.probe.delimiters), dtype=torch.int64),
        ids[counts.argsort(descending=True, stable=True)[:_FREQUENT]],
    )
    tokens = torch.empty(0)

    def attention(seen: LayerAttention) -> None:
        T = seen.q.shape[2]
        key = torch.arange(T, device=seen.q.device)
        of_kinds = [torch.isin(tokens, kind.to(tokens.device))[:, None, None, :].to(key.device) for kind in kinds]
        sums = torch.zeros(len(Destinations.__dataclass_fields__), *seen.q.shape[:2], device=key.device)
        for queries, weights in seen.blocks():
            weights = over_sum(weights)
            distance = key[queries, None] - key
            classes = [key == 0, key == 1, distance == 1, distance == 0]
            rest = ~torch.stack([c.expand_as(distance) for c in classes]).any(0)
            for of_kind in of_kinds:
                classes.append(rest & of_kind)
                rest = rest & ~of_kind
            classes.append(rest)
            late = (key[queries] >= _FIRST_QUERY)[:, None]
            sums += torch.stack([(weights * (late & c)).sum((-2, -1)) for c in classes])
        for name, value in zip(Destinations.__dataclass_fields__, sums / (T - _FIRST_QUERY), strict=True):
            totals.add(name, seen.layer, value)

    with evaluating(model), observing(model, attention=attention):
        for _, row in excerpts.batches(input_device(model), batch_tokens):
            tokens = row.tokens
            model(tokens, mask=row.mask, logits=False)
    return Destinations(**totals.means())
