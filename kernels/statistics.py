"""What attention tells of its sinks: values a query, from the forward pass, and values a key, from a second pass.

Shapes: B rows, H query heads, T positions. None of these carries a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sinkbed.kernels.mask import Mask
from sinkbed.kernels.scoring import Scoring, per_query


class Statistics(NamedTuple):
    """What a forward pass learns of the sink, without the T×T matrix. All [B, H, T]."""

    first_key_mass: Tensor
    """Attention mass on the key at row position 0; exactly 0 where the mask hides it."""
    document_mass: Tensor
    """Attention mass on the first key of the query's document (1 for a document's first query, by
    construction); exactly 0 where the mask hides it."""
    learned_sink_mass: Tensor | None
    """Attention mass on the learned sink, and in a decoder with registers on these; None without any."""
    row_sum: Tensor | None = None
    """Sum of the query's weights of tokens, where that need not be 1: beside a learned sink, or with a normaliser."""

    @property
    def normalized(self) -> "Statistics":
        """The masses over the sum of all that the query gives out, which with a normaliser need not be 1."""
        return self if self.learned_sink_mass is not None else self.among_tokens

    @property
    def among_tokens(self) -> "Statistics":
        """The masses over what the query gives to tokens; 0 where that is nothing."""
        if self.row_sum is None:
            return self
        first_key, document = (
            (mass / self.row_sum).masked_fill(self.row_sum == 0, 0.0)
            for mass in (self.first_key_mass, self.document_mass)
        )
        return self._replace(first_key_mass=first_key, document_mass=document)


class TopSinks(NamedTuple):
    """The keys that receive most, per row and head. [B, H, K], the strongest first."""

    positions: Tensor
    """int64, row positions; −1 where a row has fewer keys that count."""
    attention: Tensor
    """Mean attention received, float32; 0 where positions is −1."""


def mean_received(received: Tensor, mask: Mask) -> Tensor:
    """[B, H, T]: attention received per query that sees the key, of column sums [B, H, T]."""
    return received / mask.queries_per_key(received.device)[:, None, :]


def top_sinks(received: Tensor, mask: Mask, count: int = 8, min_queries: int = 16) -> TopSinks:
    """The `count` keys of a row and head with the largest mean attention received.

    Args:
        received: [B, H, T], column sums from `attention_received`.
        mask: the mask they were made under.
        count: K, at most T.
        min_queries: a key counts where at least this many queries see it: the last keys of a document are seen by
            few, which attend to themselves.

    Raises ValueError for shapes that differ and a count outside 1 to T.
    """
    B, _, T = received.shape
    if (mask.rows, mask.length) != (B, T):
        raise ValueError(f"mask: expected B={B}, T={T} as in received, got B={mask.rows}, T={mask.length}")
    if not 1 <= count <= T:
        raise ValueError(f"count: expected 1 to {T} (T), got {count}")
    counts = mask.queries_per_key(received.device)[:, None, :] >= min_queries
    mean = mean_received(received, mask).float().masked_fill(~counts, -1.0)
    attention, positions = mean.topk(count, dim=-1)
    missing = attention < 0
    return TopSinks(positions.masked_fill(missing, -1), attention.masked_fill(missing, 0.0))


def blocks_of(length: int, size: int = 128) -> list[slice]:
    """Slices of `size` queries that cover `length`."""
    return [slice(at, min(at + size, length)) for at in range(0, length, size)]


@torch.no_grad()
def received_in_blocks(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, scale: float) -> Tensor:
    """Column sums [B, H, T] in blocks of queries, without a kernel."""
    dtype = torch.promote_types(lse.dtype, torch.float32)  # lse may be narrower: the reference's has q's dtype
    received = torch.zeros_like(lse, dtype=dtype)
    k = k.to(dtype)
    for queries in blocks_of(q.shape[2]):
        logits = Scoring(scale=scale).logits(q, k, mask, queries)
        received += logits.sub_(lse[:, :, queries, None]).exp_().sum(2)
    return received.to(lse.dtype)


def with_key(
    output: Tensor, lse: Tensor, measured: Statistics | None, logit: Tensor, value: Tensor | None
) -> tuple[Tensor, Tensor, Statistics | None]:
    """Attention with one more key, which is no token's, from attention without it.

    With m = sigmoid(logit − lse), the key's mass, the output is (1 − m) · output + m · value; exact, also in its
    gradients, where attention has a gradient of lse.
    """
    logit = per_query(logit, lse)
    mass = (logit - lse).sigmoid()
    kept = (lse - logit).sigmoid()
    output = output * kept[..., None].to(output.dtype)
    if value is not None:
        output = output + mass[..., None].to(output.dtype) * value[:, None].to(output.dtype)
    if measured is not None:
        kept = kept.detach()
        measured = measured._replace(
            first_key_mass=measured.first_key_mass * kept,
            document_mass=measured.document_mass * kept,
            learned_sink_mass=mass.detach(),
            row_sum=kept,
        )
    return output, torch.logaddexp(lse, logit), measured
