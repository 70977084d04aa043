"""Documents cropped to one length, and what a model's hidden states are while it reads them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sinkbed.data.pack.strategy import Strategy
from sinkbed.model.observe import evaluating, input_device, observing
from sinkbed.progress import documents_read
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.inputs import Arranged, arrange
from sinkbed.train.measure.modes import InferenceMode

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Excerpts:
    """Documents cropped to one length, as a model reads them in an inference mode."""

    probe: Probe
    mode: InferenceMode
    strategy: Strategy
    rows: tuple[int, ...]
    """Numbers of the documents."""
    text: Tensor
    """[N, n] their first n token ids."""

    @classmethod
    def of(cls, probe: Probe, mode: InferenceMode, strategy: Strategy, tokens: int, count: int) -> "Excerpts":
        """The first `count` documents that have `tokens` tokens. Raises ValueError where there is none."""
        rows = [i for i, document in enumerate(probe.documents) if len(document) >= tokens][:count]
        if not rows:
            longest = max(map(len, probe.documents))
            raise ValueError(
                f"measuring: expected documents of at least {tokens} tokens, got {longest} in the longest; give longer "
                "ones, or lower measure.sink_tokens (of a probe --sink_tokens, --lengths)"
            )
        text = torch.stack([probe.documents[i][:tokens] for i in rows])
        return cls(probe, mode, strategy, tuple(rows), text)

    def batches(self, device: torch.device, batch_tokens: int) -> Iterator[tuple[Tensor, Arranged]]:
        """Text [B, n] and the rows it is in."""
        size = max(1, batch_tokens // (self.text.shape[1] + 1))
        for at in range(0, len(self.rows), size):
            yield self.batch(slice(at, at + size), device)
            documents_read(len(self.rows[at : at + size]))

    @torch.no_grad()
    def read(self, model: Any, batch_tokens: int, **observers: Any) -> None:
        """Have a model read them all while it is observed, as `observing` says."""
        with evaluating(model), observing(model, **observers):
            for _, row in self.batches(input_device(model), batch_tokens):
                model(row.tokens, mask=row.mask, logits=False)

    def batch(self, chosen: slice, device: torch.device) -> tuple[Tensor, Arranged]:
        """Text [B, n] of some of the documents, and the rows it is in."""
        text = self.text[chosen]
        lengths = torch.full((len(text),), text.shape[1])
        return text, arrange(self.probe, self.mode, self.strategy, self.rows[chosen], text, lengths, device=device)


class Totals:
    """Sums over documents of a quantity per layer; layers may come from several devices."""

    def __init__(self, documents: int) -> None:
        self.documents = documents
        self.sums: dict[str, dict[int, Tensor]] = {}

    def add(self, name: str, layer: int, values: Tensor) -> None:
        """values [B, ...], summed over B."""
        total = values.detach().double().sum(0).cpu()
        of_name = self.sums.setdefault(name, {})
        of_name[layer] = of_name[layer] + total if layer in of_name else total

    def means(self) -> dict[str, Any]:
        """By name, [layers][...] as nested lists."""
        return {
            name: [(total / self.documents).tolist() for _, total in sorted(layers.items())]
            for name, layers in self.sums.items()
        }


def hidden_states(model: Any, forward: Callable[[], Result]) -> tuple[list[Tensor], Result]:
    """The hidden states [B, T, C] of layers 0 to L with their graph, from a leaf at layer 0, in a call that has the
    model read something; and what it returns."""
    states: list[Tensor] = []

    def keep(layer: int, h: Tensor) -> Tensor | None:
        if layer == 0:
            h = h.detach().requires_grad_()
        states.append(h)
        return h if layer == 0 else None

    with torch.enable_grad(), observing(model, hidden=keep):
        return states, forward()
