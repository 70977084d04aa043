"""Measuring attention sinks on a fixed held-out probe set, in every inference mode.

The probe set is the first documents of the validation split that are long enough, each in a row of its
own: the same for every strategy. A measurement is a pure function of (model, probe, mode): it draws no
random number from the training's generators and never needs a T×T matrix.

Sink rate (arXiv 2410.10781, eq. 6; k = 0): with p_i the mass of query i on key 0 in one head, on one document,
alpha = (1/T) Σ_i p_i over the first T queries; the rate is the share of (document, layer, head) with
alpha > eps, in %. Query 0 counts (p_0 = 1), so uniform causal attention at T = 64 gives alpha = 0.074.
Sink mass is the plain mean of p_i over queries 1..T−1: query 0 would be 1 by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from model.ranges import check_number
from train.finite import finite
from train.progress import documents_read

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from data.store import TokenStore
    from data.strategy import Strategy
    from kernels import Mask
    from model import Decoder

InferenceMode = Literal["as_trained", "bos", "text", "first_key_masked", "random_first"]
MODES: tuple[InferenceMode, ...] = get_args(InferenceMode)
EPSILONS = (0.2, 0.3, 0.5, 0.8)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured during training and at its end. Raises ValueError for values without meaning."""

    documents: int = 100
    """Documents of the final measurement."""
    live_documents: int = 32
    """Documents of the measurements during training: the first of the same set."""
    live_points: int = 12
    """Measurements during training, geometrically spaced over the steps: dense early, sparser later."""
    first_step: int = 10
    """Step of the first measurement after the one at step 0."""
    state_points: int = 0
    """Measurements of states (norms, massive activations, value drain, ...) during training, spaced alike; 0: none."""
    mixing_points: int = 0
    """Measurements of mixing (perturbation, rank, paths, Jacobian) during training, spaced alike; 0: none."""
    state_documents: int = 8
    """Documents of both, the first `sink_tokens` tokens of each."""
    modes: tuple[InferenceMode, ...] = ("bos", "text", "first_key_masked")
    """Inference modes of the final measurement."""
    live_modes: tuple[InferenceMode, ...] = ("bos", "text", "first_key_masked")
    """Inference modes of the measurements during training."""
    sink_tokens: int = 64
    """T of the sink rate; documents with fewer tokens are not in the probe set."""
    onset_rate: float = 10.0
    """The onset is the first measurement whose sink rate (eps 0.3, live mode named first) reaches this, in %."""
    batch_tokens: int = 4_096
    """Tokens per forward pass of a measurement, padding included."""

    def __post_init__(self) -> None:
        for name in ("documents", "live_documents", "live_points", "first_step", "batch_tokens", "state_documents"):
            check_number(f"measure.{name}", getattr(self, name), least=1)
        for name in ("state_points", "mixing_points"):
            check_number(f"measure.{name}", getattr(self, name), least=0)
        check_number("measure.onset_rate", self.onset_rate, above=0, most=100)
        if (self.state_points or self.mixing_points) and self.sink_tokens < 8:
            raise ValueError(
                f"measure.sink_tokens: found {self.sink_tokens} with state_points or mixing_points, expected at least 8"
            )
        if self.sink_tokens < 2:
            raise ValueError(f"measure.sink_tokens: expected at least 2, found {self.sink_tokens}")
        if self.live_documents > self.documents:
            raise ValueError(
                f"measure.live_documents: expected at most documents={self.documents}, found {self.live_documents}"
            )
        for name in ("modes", "live_modes"):
            if len(set(getattr(self, name))) != len(getattr(self, name)) or not getattr(self, name):
                raise ValueError(f"measure.{name}: expected distinct modes, at least one")

    def check_context(self, context_length: int) -> None:
        """Raise ValueError where a row has no room for BOS and the tokens that are measured."""
        if context_length <= self.sink_tokens:
            raise ValueError(
                f"measure.sink_tokens={self.sink_tokens}: expected fewer than "
                f"data.context_length={context_length}; lower it or lengthen the context"
            )

    def check_placed(self, mode: InferenceMode, strategy: Strategy) -> None:
        """Raise ValueError where a mode places a token that no measured query can look at."""
        last = max((i for i, what in enumerate(leading_tokens(mode, strategy)) if what != "none"), default=0)
        if last >= self.sink_tokens:
            raise ValueError(
                f"strategy.first_token: found a token placed at position {last}, expected one before "
                f"measure.sink_tokens={self.sink_tokens}, so that every document of the probe reaches it"
            )

    def steps(self, max_steps: int, points: int | None = None) -> list[int]:
        """Steps after which to measure during training: 0, then `points` (None: `live_points`), geometric from
        first_step to max_steps."""
        points = self.live_points if points is None else points
        first = min(self.first_step, max_steps)
        ratio = (max_steps / first) ** (1 / max(1, points - 1))
        return sorted({0, max_steps} | {round(first * ratio**i) for i in range(points)})


def held_out(store: TokenStore, context_length: int, config: MeasureConfig) -> Iterator[NDArray[Any]]:
    """The first documents of a split with at least `sink_tokens` tokens, as many as are measured, cropped to a row."""
    rows = (store.slice(index, 0, context_length - 1) for index in range(store.documents))
    return islice((tokens for tokens in rows if len(tokens) >= config.sink_tokens), config.documents)


@dataclass(frozen=True, eq=False)
class Probe:
    """Held-out documents, cropped to fit a row with room for BOS.

    Raises ValueError when the validation split has no document that is long enough.
    """

    documents: tuple[torch.Tensor, ...]
    """Token ids [n] of each document, without special tokens, sink_tokens <= n <= context_length − 1."""
    token_bytes: torch.Tensor
    """[V] UTF-8 bytes that each token id stands for."""
    bos_id: int
    eos_id: int
    special_ids: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def from_store(cls, store: TokenStore, context_length: int, config: MeasureConfig) -> Probe:
        """The first documents of `store` (the validation split) with at least `sink_tokens` tokens."""
        import torch

        config.check_context(context_length)
        documents = [torch.from_numpy(tokens.astype("int64")) for tokens in held_out(store, context_length, config)]
        if not documents:
            raise ValueError(
                f"measure.sink_tokens={config.sink_tokens}: the validation split has "
                f"{store.documents} documents, none that long; lower it or raise validation_share"
            )
        return cls(
            tuple(documents),
            torch.as_tensor(store.tokenizer().token_bytes, dtype=torch.int64),
            store.manifest.bos_id,
            store.manifest.eos_id,
            frozenset(store.manifest.special_ids),
        )

    def head(self, count: int) -> Probe:
        """The first `count` documents."""
        return Probe(self.documents[:count], self.token_bytes, self.bos_id, self.eos_id, self.special_ids)

    def batches(self, batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Numbers of documents, token ids [B, n] padded on the right, lengths [B]; like lengths together."""
        import torch

        order = sorted(range(len(self.documents)), key=lambda i: len(self.documents[i]))
        while order:
            longest = len(self.documents[order[-1]]) + 1
            size = max(1, min(len(order), batch_tokens // longest))
            chosen, order = order[-size:], order[:-size]
            rows = [self.documents[i] for i in chosen]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.eos_id)
            yield chosen, padded, torch.tensor([len(row) for row in rows])
            documents_read(len(chosen))


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """One inference mode, measured. L layers, H heads; nested lists so that JSON holds it."""

    rate: dict[str, list[list[float]]]
    """eps -> [L][H] sink rate in % over the first `sink_tokens` queries."""
    rate_row: dict[str, list[list[float]]]
    """eps -> [L][H] sink rate in % over the whole (cropped) document."""
    mass: list[list[float]]
    """[L][H] mean mass on key 0 of queries 1.. over the first `sink_tokens`."""
    alpha: list[list[float]]
    """[L][H] mean alpha over the first `sink_tokens` queries, query 0 included."""
    mass_row: list[list[float]]
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

    def metrics(self, mode: str) -> dict[str, float]:
        """The result under its metric keys."""
        out = {
            f"val/loss/{mode}": self.loss,
            f"val/bits_per_byte/{mode}": self.bits_per_byte,
            f"sink/mass/{mode}": _mean(self.mass),
            f"sink/mass_row/{mode}": _mean(self.mass_row),
            f"sink/alpha/{mode}": _mean(self.alpha),
        }
        for eps in self.rate:
            out[f"sink/rate/{eps}/{mode}"] = _mean(self.rate[eps])
            out[f"sink/rate_row/{eps}/{mode}"] = _mean(self.rate_row[eps])
        for layer, heads in enumerate(self.mass):
            out[f"sink/mass_by_layer/{layer}/{mode}"] = sum(heads) / len(heads)
        if self.rate_placed is not None and self.mass_placed is not None:
            out[f"sink/mass_placed/{mode}"] = _mean(self.mass_placed)
            for eps in self.rate_placed:
                out[f"sink/rate_placed/{eps}/{mode}"] = _mean(self.rate_placed[eps])
        return out


def check_modes(names: Sequence[str]) -> tuple[InferenceMode, ...]:
    """Inference modes by name. Raises ValueError for a name that is none."""
    for name in names:
        if name not in MODES:
            raise ValueError(f"inference mode: expected one of {', '.join(MODES)}; found {name!r}")
    return tuple(mode for name in names for mode in MODES if mode == name)


def _mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def leading_tokens(mode: InferenceMode, strategy: Strategy) -> tuple[str | int, ...]:
    """What a mode puts at row positions 0, 1, ...: `none` where the text goes on, empty where it has them all."""
    by_mode: dict[str, tuple[str | int, ...]] = {"bos": ("bos",), "text": (), "random_first": ("random",)}
    leading = by_mode.get(mode, strategy.leading)
    if mode in ("as_trained", "first_key_masked") and not leading and strategy.document_start != "none":
        return (strategy.document_start,)
    return leading


def first_tokens(
    mode: InferenceMode, strategy: Strategy, probe: Probe, rows: Sequence[int]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Token ids [B, F] put into the text of the probe's documents `rows` in a mode, and their F row positions.

    `as_trained` and `first_key_masked` take what the strategy places in a row, or else before each document. A
    random token is a function of the document's number: it draws from no generator.
    """
    import torch

    leading = leading_tokens(mode, strategy)
    usable = [t for t in range(len(probe.token_bytes)) if t not in probe.special_ids]

    def token(what: str | int, position: int, row: int) -> int:
        if what == "random":
            # Knuth's multiplicative hash spreads neighbouring numbers over the vocabulary.
            return usable[(row + 1 + position * 2**20) * 2_654_435_761 % 2**32 % len(usable)]
        return {"bos": probe.bos_id, "eos": probe.eos_id}[what] if isinstance(what, str) else what

    positions = tuple(i for i, what in enumerate(leading) if what != "none")
    placed = [[token(leading[i], i, row) for i in positions] for row in rows]
    return torch.tensor(placed, dtype=torch.int64).reshape(len(rows), len(positions)), positions


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
    import torch

    from model.observe import evaluating, input_device

    shape = (model.config.layers, model.config.heads)
    above = torch.zeros(len(EPSILONS), *shape, dtype=torch.float64)
    above_row, above_placed = torch.zeros_like(above), torch.zeros_like(above)
    totals, second = torch.zeros(4, *shape, dtype=torch.float64), 0
    loss_sum, byte_sum, token_sum, documents = 0.0, 0, 0, 0
    device = input_device(model)
    config.check_placed(mode, strategy)
    with evaluating(model), torch.no_grad():
        for rows, text, lengths in probe.batches(config.batch_tokens):
            _, positions = first_tokens(mode, strategy, probe, rows)
            second = (positions or (0,))[-1] if key is None else key
            if strategy.prefix_lm or second >= config.sink_tokens - 1:
                second = 0  # no query is left to look at it
            row = arrange(probe, mode, strategy, rows, text, lengths, device=device, key=second)
            alpha, alpha_row, mass, mass_row, placed, nll = _observe(
                model, row, text, lengths, config.sink_tokens, second
            )
            for e, eps in enumerate(EPSILONS):
                above[e] += (alpha > eps).sum(0)
                above_row[e] += (alpha_row > eps).sum(0)
                above_placed[e] += (placed.mean(-1) > eps).sum(0)
            after = placed[..., 1:].mean(-1)
            totals += torch.stack([alpha.sum(0), mass.sum(0), mass_row.sum(0), after.sum(0)])
            counted = counted_targets(text, lengths, strategy)
            loss_sum += float(nll[counted].sum(dtype=torch.float64))
            byte_sum += int(probe.token_bytes[text[:, 1:][counted]].sum())
            token_sum += int(counted.sum())
            documents += len(lengths)
    if not token_sum:
        raise ValueError(
            f"measuring: expected documents longer than strategy.prefix_lm={strategy.prefix_lm}, found none"
        )
    alpha, mass, mass_row, mass_placed = (totals / documents).tolist()

    def rates(counts: torch.Tensor) -> dict[str, list[list[float]]]:
        return {str(e): (100 * counts[i] / documents).tolist() for i, e in enumerate(EPSILONS)}

    result = ModeResult(
        rate=rates(above),
        rate_row=rates(above_row),
        mass=mass,
        alpha=alpha,
        mass_row=mass_row,
        loss=loss_sum / token_sum,
        bits_per_byte=loss_sum / math.log(2) / byte_sum,
        documents=documents,
        tokens=token_sum,
        placed_key=second,
        rate_placed=rates(above_placed) if second else None,
        mass_placed=mass_placed if second else None,
    )
    return finite(result, f"sinks, mode {mode}")


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
    import torch

    from kernels import interval_mask

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
        mask = interval_mask(
            B,
            T,
            doc_start=start.to(device),
            doc_end=end,
            document=not key,
            window=strategy.window,
            shared_prefix=min(strategy.shared_prefix, T) if strategy.window is not None or not key else 0,
            prefix_lm=min(strategy.prefix_lm, T),
            hide_first_key=hide,
        )
    return Arranged(tokens.to(device), mask, slots.to(device))


def counted_targets(text: torch.Tensor, lengths: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    """[B, n−1] bool: which of the text's second and later tokens are targets: no padding, and none that a prefix LM
    shows to its own query."""
    import torch

    index = torch.arange(1, text.shape[1])[None, :]
    return (index < lengths[:, None]) & (index >= strategy.prefix_lm)


def target_nll(logits: torch.Tensor, slots: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B, n−1] negative log-likelihood, in nats, of the text's second and later tokens; logits [B, T, V]."""
    import torch

    queries, targets = slots[1:] - 1, text[:, 1:].to(logits.device)
    # A row at a time: of all at once, the copy is as large as the logits and the classes are strided, ten times slower.
    rows = (
        torch.nn.functional.cross_entropy(row[queries].float(), wanted, reduction="none")
        for row, wanted in zip(logits, targets, strict=True)
    )
    return torch.stack(list(rows))


def _observe(
    model: Decoder, row: Arranged, text: torch.Tensor, lengths: torch.Tensor, sink_tokens: int, key: int
) -> tuple[torch.Tensor, ...]:
    """One forward pass: alpha and mass [B, L, H] over sink_tokens and over the row, mass on `key` [B, L, H, queries
    from it on], nll [B, n−1]."""
    import torch

    output = model(row.tokens, mask=row.mask, statistics=True)
    assert output.logits is not None and output.statistics is not None
    nll = target_nll(output.logits, row.slots, text).cpu()
    T = row.tokens.shape[1]
    masses = torch.stack([s.row_mass for s in output.statistics], dim=1).float().cpu()  # [B, L, H, T]
    head = masses[..., :sink_tokens]
    real = (torch.arange(T)[None, :] < (lengths + T - text.shape[1])[:, None])[:, None, None, :]  # no padding
    own = masses * real
    count = real.sum(-1)
    on_key = head
    if key:
        on_key = torch.stack([s.document_mass[..., key:sink_tokens] for s in output.statistics], dim=1).float().cpu()
    return (
        head.mean(-1),
        own.sum(-1) / count,
        head[..., 1:].mean(-1),
        (own.sum(-1) - own[..., 0]) / (count - 1),
        on_key,
        nll,
    )
