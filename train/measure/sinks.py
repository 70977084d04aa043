"""Attention sinks of a model on a probe set, in an inference mode.

A measurement is a pure function of (model, probe, mode): it draws no random number from the training's generators
and never needs a T×T matrix.

Sink rate (arXiv 2410.10781, eq. 6; k = 0): with p_i the mass of query i on key 0 in one head, on one document,
alpha = (1/T) Σ_i p_i over the first T queries; the rate is the share of (document, layer, head) with
alpha > eps, in %. Query 0 counts, so uniform causal attention at T = 64 gives alpha = 0.074.
Sink mass is the plain mean of p_i over queries 1..T−1: p_0 is 1 by construction, less what a learned sink or registers
take; with softpick it may be 0.

p_i is the weight of key 0 over the sum of all that the query gives out (0 where it gives nothing). With a softmax that
is 1, and a learned sink or registers have a part of it. Two more readings are measured where they differ: beside a
learned sink the *share*, p_i over the weights of the tokens alone; with a normaliser whose weights need not add up to 1
the *raw* mass, the weight as it is, which 1 does not bound.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkbed.data.pack.strategy import Strategy
from sinkbed.kernels import Statistics
from sinkbed.model import Decoder
from sinkbed.model.observe import evaluating, input_device
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.inputs import arrange, counted_targets, target_nll
from sinkbed.train.measure.modes import MODE_LABELS, InferenceMode, placed_positions

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
    mass_raw: list[list[float]] | None = None
    """As `mass`, of the weights as they are; None but with a normaliser."""
    rate_share: dict[str, list[list[float]]] | None = None
    """As `rate`, of shares among the tokens; None without a learned key."""
    share: list[list[float]] | None = None
    """As `mass`, of shares among the tokens; None without a learned key."""
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
        if self.mass_raw is not None:
            out[f"sink/mass_raw/{mode}"] = mean(self.mass_raw)
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
    eps = torch.tensor(EPSILONS)[:, None, None, None]
    above: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(EPSILONS), *shape, dtype=torch.float64))
    masses: dict[str, Tensor] = defaultdict(lambda: torch.zeros(shape, dtype=torch.float64))
    loss_sum, byte_sum, token_sum, documents = 0.0, 0, 0, 0
    device = input_device(model)
    config.check_placed(mode, strategy)
    second = max(placed_positions(mode, strategy), default=0) if key is None else key
    if strategy.prefix_lm or second >= config.sink_tokens - 1:
        second = 0  # no query is left to look at it
    with evaluating(model), torch.no_grad():
        for rows, text, lengths in probe.batches(config.batch_tokens):
            row = arrange(probe, mode, strategy, rows, text, lengths, device=device, key=second)
            nll, statistics = target_nll(model, row, text, statistics=True)
            assert statistics is not None
            queries = lengths + row.tokens.shape[1] - text.shape[1]
            for name, of_heads in _masses(statistics, queries, config.sink_tokens, second).items():
                if name.startswith("rate"):
                    above[name] += (of_heads > eps).sum(1)
                else:
                    masses[name] += of_heads.sum(0)
            counted = counted_targets(text, lengths, strategy)
            loss_sum += float(nll.cpu()[counted].sum(dtype=torch.float64))
            byte_sum += int(probe.token_bytes[text[:, 1:][counted]].sum())
            token_sum += int(counted.sum())
            documents += len(lengths)
    if not token_sum:
        raise ValueError(f"measuring: expected documents longer than strategy.prefix_lm={strategy.prefix_lm}, got none")
    figures: dict[str, Any] = {name: (total / documents).tolist() for name, total in masses.items()}
    for name, counts in above.items():
        figures[name] = dict(zip(map(str, EPSILONS), (100 * counts / documents).tolist(), strict=True))
    result = ModeResult(
        **figures,
        loss=loss_sum / token_sum,
        bits_per_byte=loss_sum / math.log(2) / byte_sum,
        documents=documents,
        tokens=token_sum,
        placed_key=second,
    )
    return finite(result, f"sinks, mode {mode}")


def _masses(statistics: Sequence[Statistics], queries: Tensor, sink_tokens: int, key: int) -> dict[str, Tensor]:
    """Masses of a batch by their names in `ModeResult`, [B, L, H], a rate's not yet held against eps.

    Args:
        queries: [B], how many queries of a row are not padding.
        key: the second key; 0: none.
    """

    def stacked(values: Sequence[Tensor]) -> Tensor:  # [B, L, H, T]
        return torch.stack([each.float().cpu() for each in values], dim=1)  # layers may be on several devices

    normalized = [s.normalized for s in statistics]
    masses = stacked([s.first_key_mass for s in normalized])
    own = masses * (torch.arange(masses.shape[-1]) < queries[:, None])[:, None, None, :]
    count = queries[:, None, None]
    head = masses[..., :sink_tokens]
    out = {
        "rate": head.mean(-1),
        "rate_full": own.sum(-1) / count,
        "mass": head[..., 1:].mean(-1),
        "alpha": head.mean(-1),
        "mass_full": (own.sum(-1) - own[..., 0]) / (count - 1),
    }
    if key:
        placed = stacked([s.document_mass[..., key:sink_tokens] for s in normalized])
        out |= {"rate_placed": placed.mean(-1), "mass_placed": placed[..., 1:].mean(-1)}
    learned = [s.learned_sink_mass for s in statistics if s.learned_sink_mass is not None]
    if len(learned) == len(statistics):
        shares = stacked([s.among_tokens.first_key_mass for s in statistics])[..., :sink_tokens]
        out |= {"rate_share": shares.mean(-1), "share": shares[..., 1:].mean(-1)}
        out["learned_mass"] = stacked(learned)[..., 1:sink_tokens].mean(-1)
    elif statistics[0].row_sum is not None:
        out["mass_raw"] = stacked([s.first_key_mass for s in statistics])[..., 1:sink_tokens].mean(-1)
    return out


def measurement_table(step: int, results: dict[InferenceMode, ModeResult], sink_tokens: int) -> str:
    """The figures of one measurement, a line for each inference mode."""
    first = next(iter(results.values()))
    columns = {"sink rate %": ("sink/rate_eps0.3", 12, 1), "sink mass": ("sink/mass", 11, 3)}
    if first.mass_raw is not None:
        columns |= {"raw mass": ("sink/mass_raw", 10, 3)}
    if first.learned_mass is not None:
        columns |= {"of shares %": ("sink/rate_share_eps0.3", 13, 1), "sink share": ("sink/share", 12, 3)}
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
    if first.mass_raw is not None:
        lines.append("mass: over the sum of a query's weights; raw mass: the weight as it is")
    if first.share is not None:
        lines.append("mass: of all that a query gives out, the learned key included; share: of what it gives to tokens")
    return "\n".join(lines)
