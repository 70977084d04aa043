"""Whether the sink forms at the first token whatever it is: every token of the vocabulary is put there."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from sinkbed.model.observe import LayerAttention, evaluating, input_device, observing
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.measures import Column, of_attention, register_measure

_EPS = 0.3


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Each of some tokens stands at position 0 of the first text, in place of what was there."""

    tokens: int
    """How many were tried, evenly spread over the vocabulary."""
    share: list[float]
    """[L] of them, in %, for which a head of the layer gives key 0 more than 0.3, mean over queries t > 0."""
    any_layer: float
    """The same for a head of any layer."""
    strongest: list[float]
    """[L] mean over them of the attention of the layer's strongest head."""


@register_measure(
    "vocabulary",
    group="states",
    while_training=False,
    options=("vocabulary",),
    columns=(
        Column("share", "tokens with a sink %", "state/vocabulary_share/layer{layer}/{mode}", of_attention),
        Column("strongest", "strongest head", "state/vocabulary_mass/layer{layer}/{mode}", of_attention),
    ),
    note="Tokens with a sink: each of --vocabulary tokens is put at position 0 of the first text; the share of "
    "them to which a head of the layer gives more than 0.3 on average. Strongest head: its attention, their mean.",
)
@torch.no_grad()
def measure_vocabulary(model: Any, excerpts: Excerpts, batch_tokens: int, *, vocabulary: int = 512) -> Vocabulary:
    """Measure a model with `vocabulary` tokens at position 0, at most all there are; see `Vocabulary`."""
    device = input_device(model)
    ordinary = torch.tensor(excerpts.probe.ordinary_ids)
    count = min(vocabulary, len(ordinary))
    tried = ordinary[torch.arange(count) * len(ordinary) // count]
    size = max(1, batch_tokens // (excerpts.text.shape[1] + 1))
    masses: list[list[torch.Tensor]] = []

    def attention(seen: LayerAttention) -> None:
        mass = torch.cat([weights[..., 0] for _, weights in seen.blocks()], -1)[..., 1:].mean(-1)  # [B, H]
        masses[-1].append(mass.amax(-1).cpu())

    with evaluating(model), observing(model, attention=attention):
        for tokens in tried.split(size):
            text = excerpts.text[:1].expand(len(tokens), -1)
            copies = replace(excerpts, rows=excerpts.rows[:1] * len(tokens), text=text)
            _, rows = copies.batch(slice(None), device)
            rows.tokens[:, 0] = tokens.to(device)
            masses.append([])
            model(rows.tokens, mask=rows.mask, logits=False)
    strongest = torch.cat([torch.stack(layers) for layers in masses], 1)  # [L, tokens]
    above = 100.0 * (strongest > _EPS)
    return Vocabulary(
        tokens=count,
        share=above.mean(1).tolist(),
        any_layer=float(above.amax(0).mean()),
        strongest=strongest.mean(1).tolist(),
    )
