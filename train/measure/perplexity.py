"""Where the loss is: by position in the document, and with a window of keys and the first few kept (StreamingLLM).

Losses are nats per token, and the targets are the same in every line of a table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.model.observe import evaluating, input_device
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.inputs import arrange, counted_targets, target_nll
from sinkbed.train.measure.modes import InferenceMode


@dataclass(frozen=True, kw_only=True)
class Span:
    """Loss of the targets at positions `start` to `end` − 1 of their documents."""

    start: int
    end: int
    tokens: int
    loss: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Loss with the keys that a cache of constant size would hold (arXiv 2309.17453)."""

    cached: bool
    """Whether the keys are those of a cache; else those that the strategy shows."""
    kept: int
    """First keys of the row that every query sees."""
    window: int | None
    """Last keys that a query sees besides, itself included; None: all."""
    tokens: int
    """Targets: those whose query has more keys before it than the cache holds."""
    loss: float
    perplexity: float


def _losses(
    model: Any,
    probe: Probe,
    mode: InferenceMode,
    strategy: Strategy,
    batch_tokens: int,
    targets: Strategy | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [P] and counts [P] of the losses of the targets at text positions 1 to P, over documents; the targets are
    those that count under another strategy, where one is given."""
    longest = max(map(len, probe.documents)) - 1
    sums, counts = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.int64)
    with evaluating(model), torch.no_grad():
        for rows, text, lengths in probe.batches(batch_tokens):
            row = arrange(probe, mode, strategy, rows, text, lengths, device=input_device(model))
            nll = target_nll(model, row, text)[0].cpu().double()
            counted = counted_targets(text, lengths, strategy if targets is None else targets)
            sums[: nll.shape[1]] += (nll * counted).sum(0)
            counts[: nll.shape[1]] += counted.sum(0)
    return sums, counts


def by_position(model: Any, probe: Probe, mode: InferenceMode, strategy: Strategy, batch_tokens: int) -> list[Span]:
    """Loss by position in the document, in spans that double: 1, 2 to 3, 4 to 7, ... (arXiv 2402.13991)."""
    sums, counts = _losses(model, probe, mode, strategy, batch_tokens)
    spans, start = [], 1
    while start <= len(sums):
        part = slice(start - 1, 2 * start - 1)
        tokens = int(counts[part].sum())
        end = min(2 * start, len(sums) + 1)
        if tokens:  # a prefix LM counts none of the first
            loss = float(sums[part].sum()) / tokens
            spans.append(Span(start=start, end=end, tokens=tokens, loss=loss, perplexity=_exp(loss)))
        start *= 2
    return finite(spans, f"loss by position, mode {mode}")


def check_cache(longest: int, cache: int, kept: Sequence[int], strategy: Strategy) -> None:
    """Raise ValueError for a cache that a document of `longest` tokens does not overflow, that k first keys fill, or
    that holds more than the strategy's own window."""
    if strategy.window is not None and cache > strategy.window:
        raise ValueError(
            f"cache: expected at most {strategy.window} keys, the window that the model was trained with, got {cache}, "
            "which would show it keys that it never saw"
        )
    if longest <= cache + 1:
        raise ValueError(
            f"cache: expected fewer keys than the longest document has tokens ({longest}), less one, got {cache}; "
            "give longer documents, or a smaller cache"
        )
    for k in kept:
        if not 0 <= k < cache:
            raise ValueError(f"kept first keys: expected 0 to {cache - 1}, fewer than the cache of {cache}, got {k}")


def streaming(
    model: Any,
    probe: Probe,
    mode: InferenceMode,
    strategy: Strategy,
    batch_tokens: int,
    *,
    cache: int,
    kept: Sequence[int],
) -> list[Streaming]:
    """Loss with a cache of `cache` keys: the first k kept, and the last cache − k; first of all with the keys that the
    strategy shows.

    Positions are those of the text, where StreamingLLM counts them within its cache.

    Raises ValueError: see `check_cache`.
    """
    longest = max(map(len, probe.documents))
    check_cache(longest, cache, kept, strategy)
    # A prefix LM's prefix would show keys that a cache has lost.
    caches = [replace(strategy, window=cache - k, shared_prefix=k, prefix_lm=0) for k in kept]
    lines = []
    for shown in (strategy, *caches):
        sums, counts = _losses(model, probe, mode, shown, batch_tokens, targets=strategy)
        # The query of the target at text position p has at least p keys, its own included.
        tokens = int(counts[cache:].sum())
        if not tokens:
            raise ValueError(
                f"cache: expected documents with targets past {cache} keys, got none outside strategy.prefix_lm="
                f"{strategy.prefix_lm}; give longer ones, or a smaller cache"
            )
        loss = float(sums[cache:].sum()) / tokens
        lines.append(
            Streaming(
                cached=shown is not strategy,
                kept=shown.shared_prefix,
                window=shown.window,
                tokens=tokens,
                loss=loss,
                perplexity=_exp(loss),
            )
        )
    return finite(lines, f"streaming, mode {mode}")


def _exp(loss: float) -> float:
    """A perplexity, at most about 1e304: more is past what a number holds."""
    return math.exp(min(loss, 700))
