"""States around the sink: what is unlike the others about the first token.

Sources: norms and cosines of the first token, arXiv 2410.10781; massive activations, 2402.17762; value drain,
2410.13835; kurtosis, 2504.20966; secondary sinks, 2512.22213.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkbed.kernels import mean_received, top_sinks
from sinkbed.model.observe import LayerAttention, evaluating, input_device, observing, over_sum
from sinkbed.train.measure.excerpts import Excerpts, Totals
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.measures import Column, of_heads, register_measure

_ALIKE = 0.9
"""|cos| with the first token's hidden state from which a token counts as a secondary sink."""
_TOP = 10
_MIN_QUERIES = 16


@dataclass(frozen=True, kw_only=True)
class States:
    """L layers, H query heads, Hkv key heads, T tokens a row; nested lists so that JSON holds it."""

    documents: int
    tokens: int
    """T, the first tokens of the mode included."""
    norm: list[list[float]]
    """[L+1][T] ‖h_t‖."""
    norm_ratio: list[float]
    """[L+1] ‖h_0‖ over the mean of ‖h_t‖, t > 0."""
    max_activation: list[float]
    """[L+1] max |h| over tokens and channels."""
    max_over_median: list[float]
    """[L+1] max |h| over the median of |h|."""
    massive: list[dict[str, int | float]]
    """[L+1] where the largest |h| over all documents is: document, position, channel, token id, value."""
    kurtosis_first: list[float]
    """[L+1] kurtosis of the first token's channels (3 for a normal distribution)."""
    kurtosis: list[float]
    """[L+1] the same, mean of the other tokens."""
    secondary_share: list[float]
    """[L+1] share of the tokens past the first with |cos(h_t, h_0)| > 0.9."""
    key_norm_ratio: list[list[float]]
    """[L][Hkv] ‖k_0‖ over the mean of ‖k_t‖, t > 0."""
    value_norm_ratio: list[list[float]]
    """[L][Hkv] ‖v_0‖ over the mean of ‖v_t‖, t > 0: the value drain."""
    cosine_first: list[list[float]]
    """[L][H] mean of cos(q_t, k_0), t > 0."""
    cosine_others: list[list[float]]
    """[L][H] mean over t > 0 of the mean of cos(q_t, k_s) over 0 < s ≤ t."""
    entropy: list[list[float]]
    """[L][H] entropy of the shares of a query's attention, nats, mean over queries t > 0."""
    received: list[list[float]]
    """[L][T] attention received by a key from each query that sees it, mean over heads."""
    strongest_position: list[dict[str, Any]]
    """Row positions by the share of (document, layer, head) in which they receive most, among keys that at least 16
    queries see (or as many as any key is seen by): position, share. The strongest ten."""
    strongest_token: list[dict[str, Any]]
    """The same by token id and whether it stands first: token, first, share."""


@register_measure(
    "states",
    group="states",
    columns=(
        Column("norm_ratio", "‖h₀‖ / ‖hₜ‖", "state/first_token_norm_ratio/layer{layer}/{mode}"),
        Column("max_activation", "max |h|", "state/max_activation/layer{layer}/{mode}"),
        Column("max_over_median", "max / median"),
        Column("kurtosis_first", "kurtosis h₀"),
        Column("kurtosis", "kurtosis hₜ"),
        Column("secondary_share", "|cos(hₜ, h₀)| > 0.9"),
        Column("key_norm_ratio", "‖k₀‖ / ‖kₜ‖", "state/key_norm_ratio/layer{layer}/{mode}", of_heads),
        Column("value_norm_ratio", "‖v₀‖ / ‖vₜ‖", "state/value_norm_ratio/layer{layer}/{mode}", of_heads),
        Column("cosine_first", "cos(qₜ, k₀)", read=of_heads),
        Column("cosine_others", "cos(qₜ, kₛ)", read=of_heads),
        Column("entropy", "entropy", "state/entropy/layer{layer}/{mode}", of_heads),
    ),
    note="Subscript 0: the first token of the row; t: mean over the others; s: mean over the tokens 1 to t. max, "
    "median: of |h| over all tokens, the first included, and channels. |cos(hₜ, h₀)| > 0.9: share of "
    "secondary sinks. Kurtosis: of a token's channels, 3 for a normal distribution. Entropy: of the "
    "shares of a query's attention, nats.",
)
@torch.no_grad()
def measure_states(model: Any, excerpts: Excerpts, batch_tokens: int) -> States:
    """Measure a model on documents in one inference mode; see `States`."""
    totals = Totals(len(excerpts.rows))
    massive: dict[int, dict[str, int | float]] = {}
    positions: Counter[int] = Counter()
    tokens_seen: Counter[tuple[int, bool]] = Counter()
    ids, done, total = torch.empty(0), 0, 0

    def hidden(layer: int, h: Tensor) -> None:
        h = h.float()
        norms, size = h.norm(dim=-1), h.abs()
        totals.add("norm", layer, norms)
        totals.add("norm_ratio", layer, norms[:, 0] / norms[:, 1:].mean(-1))
        flat = size.flatten(1)
        largest, where = flat.max(-1)
        totals.add("max_activation", layer, largest)
        totals.add("max_over_median", layer, largest / flat.median(-1).values)
        row = int(largest.argmax())
        if layer not in massive or massive[layer]["value"] < float(largest[row]):
            position, channel = divmod(int(where[row]), h.shape[-1])
            massive[layer] = {
                "document": excerpts.rows[done + row], "position": position, "channel": channel,
                "token": int(ids[row, position]), "value": float(largest[row]),
            }  # fmt: skip
        centred = h - h.mean(-1, keepdim=True)
        kurtosis = centred.pow(4).mean(-1) / centred.pow(2).mean(-1).square()
        totals.add("kurtosis_first", layer, kurtosis[:, 0])
        totals.add("kurtosis", layer, kurtosis[:, 1:].mean(-1))
        cosine = torch.cosine_similarity(h[:, 1:], h[:, :1], dim=-1)
        totals.add("secondary_share", layer, (cosine.abs() > _ALIKE).float().mean(-1))

    def attention(seen: LayerAttention) -> None:
        layer, q, k, v = seen.layer, seen.q.float(), seen.k.float(), seen.v.float()
        for name, x in (("key_norm_ratio", k), ("value_norm_ratio", v)):
            norms = x.norm(dim=-1)
            totals.add(name, layer, norms[..., 0] / norms[..., 1:].mean(-1))
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        totals.add("cosine_first", layer, (q[:, :, 1:] * k[:, :, :1]).sum(-1).mean(-1))
        counts = torch.arange(1, k.shape[2], device=k.device)[:, None]
        totals.add("cosine_others", layer, (q[:, :, 1:] * (k[:, :, 1:].cumsum(2) / counts)).sum(-1).mean(-1))
        entropy = torch.cat([torch.special.entr(over_sum(p)).sum(-1) for _, p in seen.blocks()], -1)
        totals.add("entropy", layer, entropy[..., 1:].mean(-1))
        received = seen.received()
        totals.add("received", layer, mean_received(received, seen.mask).mean(1))
        seen_by = int(seen.mask.queries_per_key(q.device).max())  # few under a window
        first = top_sinks(received, seen.mask, 1, min(_MIN_QUERIES, seen_by)).positions[..., 0].cpu()  # [B, H]
        positions.update(first.flatten().tolist())
        of_head = ids.gather(1, first)
        tokens_seen.update(zip(of_head.flatten().tolist(), (first == 0).flatten().tolist(), strict=True))

    with evaluating(model):
        for text, row in excerpts.batches(input_device(model), batch_tokens):
            ids = row.tokens.cpu()
            with observing(model, attention=attention, hidden=hidden):
                model(row.tokens, mask=row.mask, logits=False)
            done += len(text)
            total = row.tokens.shape[1]
    heads = sum(positions.values())
    return States(
        documents=done,
        tokens=total,
        massive=[massive[layer] for layer in sorted(massive)],
        strongest_position=[
            {"position": position, "share": count / heads} for position, count in positions.most_common(_TOP)
        ],
        strongest_token=[
            {"token": token, "first": first, "share": count / heads}
            for (token, first), count in tokens_seen.most_common(_TOP)
        ],
        **totals.means(),
    )


@torch.no_grad()
def strongest_head(
    model: Any, excerpts: Excerpts, tokens: int = 32, head: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The attention [T][T] of one head in the first document's first tokens.

    Args:
        head: its layer and number; None: the one that attends most to the first key.
    """
    best: dict[str, Any] = {"mass": -1.0}

    def attention(seen: LayerAttention) -> None:
        if head is not None and seen.layer != head[0]:
            return
        _, block = next(seen.blocks(tokens))  # the first queries are enough
        p = block[0, :, :, :tokens]  # [H, T, T]
        mass = p[:, 1:, 0].mean(-1)
        at = int(mass.argmax()) if head is None else head[1]
        if float(mass[at]) > best["mass"]:
            best.update(layer=seen.layer, head=at, mass=float(mass[at]), attention=p[at].tolist())

    with evaluating(model):
        _, row = excerpts.batch(slice(0, 1), input_device(model))
        with observing(model, attention=attention):
            model(row.tokens, mask=row.mask, logits=False)
    return finite(best, f"the strongest head, mode {excerpts.mode}") | {"tokens": row.tokens[0, :tokens].tolist()}
