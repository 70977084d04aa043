"""Attention sinks of a model on a probe set, in an inference mode.

A measurement is a pure function of (model, probe, mode): it draws no random number from the training's generators
and never needs a T×T matrix.

Sink rate (arXiv 2410.10781, eq. 6; k = 0): with p_i the mass of query i on key 0 in one head, on one document,
alpha = (1/T) Σ_i p_i over the first T queries; the rate is the share of (document, layer, head) with
alpha > eps, in %. Query 0 counts (p_0 = 1), so uniform causal attention at T = 64 gives alpha = 0.074.
Sink mass is the plain mean of p_i over queries 1..T−1: query 0 would be 1 by construction.

Where the weights of a query need not add up to 1 (a learned sink takes a part, or another normaliser stands in the
softmax's place), p_i has two readings, and both are measured: the raw mass, and its share, p_i over the sum of the
query's weights of tokens (0 where that is 0).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.kernels import Statistics
from sinkbed.model import Decoder
from sinkbed.model.observe import evaluating, input_device
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.inputs import Arranged, arrange, counted_targets, first_tokens, target_nll
from sinkbed.train.measure.modes import MODE_LABELS, InferenceMode

EPSILONS = (0.2, 0.3, 0.5, 0.8)


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """One inference mode, measured. L layers, H heads; nested lists so that JSON holds it."""

    rate: dict[str, list[list[float]]]
    """eps -> [L][H] sink rate in % over the first `sink_tokens` queries."""
    rate_full: dict[str, list[list[float]]]
    """eps -> [L][H] sink rate in % over the whole (cropped) document."""
    mass: list[list[float]]
    """[L][H] mean mass on key 0 of queries 1.. over the first `sink_tokens`."""
    alpha: list[list[float]]
    """[L][H] mean alpha over the first `sink_tokens` queries, query 0 included."""
    mass_full: list[list[float]]
    """[L][H] as mass, over the whole document."""
    loss: float
    """Mean negative log-likelihood of the text's second and later tokens, nats per token."""
    bits_per_byte: float
    """The same in bits per UTF-8 byte of those tokens: comparable across tokenizers."""
    documents: int
    tokens: int
    """Targets that the loss is the mean of: the same in every mode."""
    placed_key: int = 0
    """Row position of a second key that is measured, by default the last at which the mode places a token; 0: none."""
    rate_placed: dict[str, list[list[float]]] | None = None
    """eps -> [L][H] sink rate in % at key `placed_key`, over its own and later queries among the first `sink_tokens`.
    None without such a key, and under a prefix LM."""
    mass_placed: list[list[float]] | None = None
    """[L][H] mean mass on key `placed_key` of the queries after it among the first `sink_tokens`."""
    rate_share: dict[str, list[list[float]]] | None = None
    """As `rate`, of shares instead of masses; None where a query's weights add up to 1."""
    share: list[list[float]] | None = None
    """As `mass`, of shares."""
    learned_mass: list[list[float]] | None = None
    """[L][H] as `mass`, on the learned key or the registers; None without any."""

    def metrics(self, mode: str) -> dict[str, float]:
        """The result under its metric keys."""
        out = {
            f"val/loss/{mode}": self.loss,
            f"val/bits_per_byte/{mode}": self.bits_per_byte,
            f"sink/mass/{mode}": mean(self.mass),
            f"sink/mass_full/{mode}": mean(self.mass_full),
            f"sink/alpha/{mode}": mean(self.alpha),
        }
        for eps in self.rate:
            out[f"sink/rate_eps{eps}/{mode}"] = mean(self.rate[eps])
            out[f"sink/rate_full_eps{eps}/{mode}"] = mean(self.rate_full[eps])
            if eps == "0.3" and len(self.rate[eps]) > 2:
                out[f"sink/rate_deep_eps0.3/{mode}"] = mean(self.rate[eps][2:])
        for layer, heads in enumerate(self.mass):
            out[f"sink/mass/layer{layer}/{mode}"] = sum(heads) / len(heads)
        out[f"sink/strongest_head/{mode}"] = max(map(max, self.mass))
        if self.rate_placed is not None and self.mass_placed is not None:
            out[f"sink/mass_placed/{mode}"] = mean(self.mass_placed)
            for eps in self.rate_placed:
                out[f"sink/rate_placed_eps{eps}/{mode}"] = mean(self.rate_placed[eps])
        if self.rate_share is not None and self.share is not None:
            out[f"sink/share/{mode}"] = mean(self.share)
            for eps in self.rate_share:
                out[f"sink/rate_share_eps{eps}/{mode}"] = mean(self.rate_share[eps])
        if self.learned_mass is not None:
            out[f"sink/learned_mass/{mode}"] = mean(self.learned_mass)
        return out


def mean(rows: list[list[float]]) -> float:
    """Over layers and heads."""
    return sum(map(sum, rows)) / sum(map(len, rows))


def measure(
    model: Decoder,
    probe: Probe,
    mode: InferenceMode,
    strategy: Strategy,
    config: MeasureConfig,
    key: int | None = None,
) -> ModeResult:
    """Measure a model on a probe set in one inference mode.

    Args:
        key: row position of a second key to measure, besides the first. None: see `ModeResult.placed_key`.

    The strategy's window, shared prefix and prefix LM apply as in training; the probe's rows hold one
    document each. The loss counts the same targets in every mode: the text's second and later tokens,
    without those that a prefix LM shows to their own queries.

    Raises ValueError where no target is left to count, and where a quantity is not finite.
    """
    shape = (model.config.n_layers, model.config.n_heads)
    above = torch.zeros(len(EPSILONS), *shape, dtype=torch.float64)
    above_row, above_placed, above_share = (torch.zeros_like(above) for _ in range(3))
    totals, second = torch.zeros(6, *shape, dtype=torch.float64), 0
    loss_sum, byte_sum, token_sum, documents, sums_to_one, learns = 0.0, 0, 0, 0, True, False
    device = input_device(model)
    config.check_placed(mode, strategy)
    with evaluating(model), torch.no_grad():
        for rows, text, lengths in probe.batches(config.batch_tokens):
            _, positions = first_tokens(mode, strategy, probe, rows)
            second = (positions or (0,))[-1] if key is None else key
            if strategy.prefix_lm or second >= config.sink_tokens - 1:
                second = 0  # no query is left to look at it
            row = arrange(probe, mode, strategy, rows, text, lengths, device=device, key=second)
            alpha, alpha_row, mass, mass_full, placed, shares, learned, nll = _observe(
                model, row, text, lengths, config.sink_tokens, second
            )
            sums_to_one, learns = sums_to_one and shares is None, learned is not None
            shares = placed if shares is None else shares
            for e, eps in enumerate(EPSILONS):
                above[e] += (alpha > eps).sum(0)
                above_row[e] += (alpha_row > eps).sum(0)
                above_placed[e] += (placed.mean(-1) > eps).sum(0)
                above_share[e] += (shares.mean(-1) > eps).sum(0)
            after, share = placed[..., 1:].mean(-1), shares[..., 1:].mean(-1)
            learned = torch.zeros_like(mass) if learned is None else learned
            totals += torch.stack([x.sum(0) for x in (alpha, mass, mass_full, after, share, learned)])
            counted = counted_targets(text, lengths, strategy)
            loss_sum += float(nll[counted].sum(dtype=torch.float64))
            byte_sum += int(probe.token_bytes[text[:, 1:][counted]].sum())
            token_sum += int(counted.sum())
            documents += len(lengths)
    if not token_sum:
        raise ValueError(f"measuring: expected documents longer than strategy.prefix_lm={strategy.prefix_lm}, got none")
    alpha, mass, mass_full, mass_placed, share, learned = (totals / documents).tolist()

    def rates(counts: torch.Tensor) -> dict[str, list[list[float]]]:
        return {str(e): (100 * counts[i] / documents).tolist() for i, e in enumerate(EPSILONS)}

    result = ModeResult(
        rate=rates(above),
        rate_full=rates(above_row),
        mass=mass,
        alpha=alpha,
        mass_full=mass_full,
        loss=loss_sum / token_sum,
        bits_per_byte=loss_sum / math.log(2) / byte_sum,
        documents=documents,
        tokens=token_sum,
        placed_key=second,
        rate_placed=rates(above_placed) if second else None,
        mass_placed=mass_placed if second else None,
        rate_share=None if sums_to_one else rates(above_share),
        share=None if sums_to_one else share,
        learned_mass=learned if learns else None,
    )
    return finite(result, f"sinks, mode {mode}")


def measurement_table(step: int, results: dict[InferenceMode, ModeResult], sink_tokens: int) -> str:
    """The figures of one measurement, a line for each inference mode."""
    first = next(iter(results.values()))
    columns = {"sink rate %": ("sink/rate_eps0.3", 12, 1), "sink mass": ("sink/mass", 11, 3)}
    if first.share is not None:
        columns |= {"of shares %": ("sink/rate_share_eps0.3", 13, 1), "sink share": ("sink/share", 12, 3)}
    if first.learned_mass is not None:
        columns |= {"learned key": ("sink/learned_mass", 13, 3)}
    columns |= {"loss": ("val/loss", 8, 3), "bits/byte": ("val/bits_per_byte", 11, 3)}
    lines = [
        f"step {step}, {first.documents} documents, T = {sink_tokens}, eps 0.3",
        f"{'input':26}" + "".join(f"{title:>{width}}" for title, (_, width, _) in columns.items()),
    ]
    for mode, result in results.items():
        m = result.metrics(mode)
        figures = (f"{m[f'{key}/{mode}']:{width}.{digits}f}" for key, width, digits in columns.values())
        lines.append(f"{MODE_LABELS[mode]:26}" + "".join(figures))
    if first.share is not None:
        lines.append(
            "share: the mass over the sum of a query's weights of tokens. The sink rate averages over query 0 too, "
            "whose weight on itself need not be 1 here: read the rate of shares"
        )
    return "\n".join(lines)


def _observe(
    model: Decoder, row: Arranged, text: torch.Tensor, lengths: torch.Tensor, sink_tokens: int, key: int
) -> tuple[Any, ...]:
    """One forward pass: alpha and mass [B, L, H] over sink_tokens and over the row, mass on `key` [B, L, H, queries
    from it on], shares [B, L, H, sink_tokens] or None where weights add up to 1, mass on a learned key [B, L, H] or
    None without one, nll [B, n−1]."""
    nll, statistics = target_nll(model, row, text, statistics=True)
    assert statistics is not None
    T = row.tokens.shape[1]
    masses = torch.stack([s.first_key_mass for s in statistics], dim=1).float().cpu()  # [B, L, H, T]
    head = masses[..., :sink_tokens]
    real = (torch.arange(T)[None, :] < (lengths + T - text.shape[1])[:, None])[:, None, None, :]  # no padding
    own = masses * real
    count = real.sum(-1)
    on_key = head
    if key:
        on_key = torch.stack([s.document_mass[..., key:sink_tokens] for s in statistics], dim=1).float().cpu()
    return (
        head.mean(-1),
        own.sum(-1) / count,
        head[..., 1:].mean(-1),
        (own.sum(-1) - own[..., 0]) / (count - 1),
        on_key,
        _shares(statistics, sink_tokens),
        _learned(statistics, sink_tokens),
        nll.cpu(),
    )


def _learned(statistics: Sequence[Statistics], sink_tokens: int) -> torch.Tensor | None:
    """[B, L, H] mean mass of queries 1.. on the learned key or the registers; None without any."""
    layers = [s.learned_sink_mass for s in statistics]
    if any(mass is None for mass in layers):
        return None
    return torch.stack([mass[..., 1:sink_tokens].mean(-1).float().cpu() for mass in layers if mass is not None], dim=1)


def _shares(statistics: Sequence[Statistics], sink_tokens: int) -> torch.Tensor | None:
    """[B, L, H, sink_tokens] first-key mass over the sum of the query's weights of tokens; None where that is 1."""
    layers = []
    for layer in statistics:
        if layer.row_sum is None:
            return None
        share = (layer.first_key_mass / layer.row_sum).masked_fill(layer.row_sum == 0, 0.0)
        layers.append(share[..., :sink_tokens].float().cpu())
    return torch.stack(layers, dim=1)
