"""Registers: learned vectors before every row, which every query sees and no loss is taken at (arXiv 2309.16588).

They are to the tokens what a learned sink is: what is measured of attention is that of tokens on tokens, and the mass
on registers is what the weights lack to 1.
"""

import torch
from torch import Tensor

from sinkbed.kernels import AttentionOutput, Mask
from sinkbed.kernels.scoring import Scoring
from sinkbed.kernels.statistics import blocks_of


def with_registers(mask: Mask, count: int, device: torch.device) -> Mask:
    """The mask [B, T] of rows that begin with `count` registers, [B, count + T]: visible to all that comes after them.

    Raises ValueError for a shared prefix whose first key is hidden: the two would be apart.
    """
    if mask.shared_from and mask.shared[1]:
        raise ValueError(
            f"registers: expected no shared prefix where key 0 is hidden, got one of {mask.shared_prefix}; leave "
            "the mode first_key_masked out"
        )
    own = torch.arange(count, dtype=torch.int32, device=device).expand(mask.rows, -1)
    starts = torch.zeros_like(own)

    def shifted(tokens: Tensor | None, registers: Tensor) -> Tensor | None:
        return None if tokens is None else torch.cat([registers, tokens + count], dim=1)

    doc_start = mask.doc_start
    if doc_start is None:
        doc_start = torch.zeros(mask.rows, mask.length, dtype=torch.int32, device=device)
    return Mask(
        rows=mask.rows,
        length=count + mask.length,
        first_key=shifted(mask.first_key, starts),
        end_key=shifted(mask.end_key, own + 1),
        shared_prefix=0 if mask.first_key is None else count + mask.shared[1],
        doc_start=shifted(doc_start, starts),
    )


def without_registers(mask: Mask, count: int) -> Mask:
    """The mask of the tokens alone."""

    def shifted(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x[:, count:] - count).clamp_min(0)

    return Mask(
        rows=mask.rows,
        length=mask.length - count,
        first_key=shifted(mask.first_key),
        end_key=shifted(mask.end_key),
        shared_prefix=max(0, mask.shared_prefix - count),
        doc_start=shifted(mask.doc_start),
    )


@torch.no_grad()
def of_tokens(out: AttentionOutput, q: Tensor, k: Tensor, mask: Mask, scoring: Scoring, count: int) -> AttentionOutput:
    """Statistics of the queries and keys that are tokens, of attention over rows that begin with `count` registers."""
    assert out.statistics is not None and out.lse is not None
    weights = []
    for block in blocks_of(mask.length - count):
        queries = slice(count + block.start, count + block.stop)
        logits = scoring.logits(q, k, mask, queries)
        own = logits.sub_(out.lse[:, :, queries, None]).exp_()
        weights.append(torch.stack([own[..., :count].sum(-1), own[..., count], own[..., count:].sum(-1)]))
    on_registers, first_key, row_sum = torch.cat(weights, dim=-1)
    document, learned = out.statistics.document_mass[:, :, count:], out.statistics.learned_sink_mass
    return out._replace(
        statistics=out.statistics._replace(
            first_key_mass=first_key,
            document_mass=document,
            learned_sink_mass=on_registers if learned is None else on_registers + learned[:, :, count:],
            row_sum=row_sum,
        )
    )
