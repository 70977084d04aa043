"""Documents as a model reads them in an inference mode: tokens, mask, and which targets count."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.kernels import Mask, Statistics
from sinkbed.model.loss import BLOCK_LOGITS, IGNORED
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.masks import strategy_mask
from sinkbed.train.measure.modes import InferenceMode, first_tokens_of, placed_positions

MOST_LOGITS = 2**27
"""Logits [B, T, V] that are made at once, at most; of more, a block at a time, which may round otherwise. What runs
measure stays below: 4,096 tokens of a vocabulary of 32,768."""


def first_tokens(
    mode: InferenceMode, strategy: Strategy, probe: Probe, rows: Sequence[int]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Token ids [B, F] put into the text of the probe's documents `rows` in a mode, and their F row positions.

    `as_trained` and `first_key_masked` take what the strategy places in a row, or else before each document. A
    random token is a function of the document's number: it draws from no generator.
    """
    first_tokens = first_tokens_of(mode, strategy)
    ordinary = probe.ordinary_ids

    def token(what: str | int, position: int, row: int) -> int:
        if what == "random":
            # Knuth's multiplicative hash spreads neighbouring numbers over the vocabulary.
            return ordinary[(row + 1 + position * 2**20) * 2_654_435_761 % 2**32 % len(ordinary)]
        return {"bos": probe.bos_id, "eos": probe.eos_id}[what] if isinstance(what, str) else what

    positions = placed_positions(mode, strategy)
    placed = [[token(first_tokens[i], i, row) for i in positions] for row in rows]
    return torch.tensor(placed, dtype=torch.int64).reshape(len(rows), len(positions)), positions


class Arranged(NamedTuple):
    """Documents as a model reads them in an inference mode."""

    tokens: torch.Tensor
    """[B, T]."""
    mask: Mask | None
    slots: torch.Tensor
    """[n] row positions of the text's tokens."""


def arrange(
    probe: Probe,
    mode: InferenceMode,
    strategy: Strategy,
    rows: Sequence[int],
    text: torch.Tensor,
    lengths: torch.Tensor,
    *,
    device: torch.device,
    key: int = 0,
) -> Arranged:
    """The row of each document in a mode: the text with its first tokens, and the strategy's window, shared prefix
    and prefix LM as in training.

    Args:
        rows: numbers of the documents.
        text: [B, n] their token ids, padded on the right.
        lengths: [B] tokens of each.
        key: a key other than the first is observed as if a document started there that the mask does not keep apart.
    """
    first, positions = first_tokens(mode, strategy, probe, rows)
    hide = mode == "first_key_masked"
    shift = len(positions)
    B, T = len(text), text.shape[1] + shift
    slots = torch.tensor([i for i in range(T) if i not in positions], dtype=torch.int64)
    tokens = torch.empty(B, T, dtype=torch.int64)
    tokens[:, slots] = text
    tokens[:, list(positions)] = first
    mask = None
    if strategy.window is not None or strategy.prefix_lm or hide or key:
        # One document a row; its end matters to a prefix LM, whose prefix must not reach into the padding.
        end = (lengths + shift).to(torch.int32)[:, None].expand(B, T).contiguous().to(device)
        start = torch.where(torch.arange(T) < key, 0, key).to(torch.int32)[None, :].expand(B, T).contiguous()
        mask = strategy_mask(strategy, start.to(device), end, document=not key, hide_first_key=hide)
    return Arranged(tokens.to(device), mask, slots.to(device))


def counted_targets(text: torch.Tensor, lengths: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    """[B, n−1] bool: which of the text's second and later tokens are targets: no padding, and none that a prefix LM
    shows to its own query."""
    index = torch.arange(1, text.shape[1])[None, :]
    return (index < lengths[:, None]) & (index >= strategy.prefix_lm)


def target_nll(
    model: Any, row: Arranged, text: torch.Tensor, *, statistics: bool = False
) -> tuple[torch.Tensor, tuple[Statistics, ...] | None]:
    """[B, n−1] negative log-likelihood, in nats, of the text's second and later tokens, and statistics where asked for.

    At most `MOST_LOGITS` logits are there at once.
    """
    queries, targets, size = row.slots[1:] - 1, text[:, 1:], model.vocab_size
    if row.tokens.numel() * size > MOST_LOGITS:
        next_tokens = torch.full_like(row.tokens, IGNORED)
        next_tokens[:, queries] = targets.to(next_tokens.device)
        output = model(row.tokens, mask=row.mask, statistics=statistics, next_tokens=next_tokens)
        return output.nll[:, queries.to(output.nll.device)], output.statistics
    output = model(row.tokens, mask=row.mask, statistics=statistics)
    # A row at a time: of all at once, the copy is as large as the logits and the classes are strided, ten times slower.
    block = max(1, BLOCK_LOGITS // size)
    rows = [
        torch.cat(
            [
                torch.nn.functional.cross_entropy(logits[at].float(), wanted.to(logits.device), reduction="none")
                for at, wanted in zip(queries.split(block), of_row.split(block), strict=True)
            ]
        )
        for logits, of_row in zip(output.logits, targets, strict=True)
    ]
    return torch.stack(rows), output.statistics
