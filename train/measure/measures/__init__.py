"""What is measured layer by layer around the sink, a file each.

`register_measure` registers a measure under the name that `sinkbed probe --measure` takes. Its columns say how its
result is read: tables, CSV files, figures and the points that are logged while training are made from them alone.

Hidden states are numbered from l = 0, what the first block reads, to L, what the last block writes (before the final
norm). Every document is cropped to one length, so that no padding takes part; a figure is a mean over documents unless
it says otherwise. Of a layer only a few numbers a token are kept; `paths` alone carries a matrix T×T on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, TypeVar, cast

from sinkbed.registry import Registry
from sinkbed.train.measure.finite import finite

MEASURES = Registry("--measure", __name__)

Group = Literal["states", "mixing"]
"""Measures of one table, and of one cadence while training: `measure.state_points` or `measure.mixing_points`."""
Layers = Sequence[float | None]
"""[L+1]; None where a layer has no figure."""
Function = TypeVar("Function", bound=Callable[..., Any])


def of_hidden(result: Any, key: str) -> Layers:
    """Of [L+1] values."""
    return list(result[key])


def of_attention(result: Any, key: str) -> Layers:
    """Of [L] values: what the first block reads has no attention."""
    return [None, *result[key]]


def of_heads(result: Any, key: str) -> Layers:
    """Of [L][H] values, their mean over heads."""
    return [None, *(sum(heads) / len(heads) for heads in result[key])]


@dataclass(frozen=True)
class Column:
    """One figure a layer, out of a measure's result."""

    key: str
    title: str
    log: str = ""
    """Metric key while training: of each layer with `{layer}` in it, else of the last one. Empty: not logged."""
    read: Callable[[Any, str], Layers] = of_hidden
    """(result, key) -> values."""
    error: str = ""
    """Key of its standard error, which figures draw."""

    def values(self, result: Any) -> Layers:
        """Of a result as JSON has it."""
        return self.read(result, self.key)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How something is measured and read."""

    group: Group
    measure: Callable[..., Any]
    """(model, `Excerpts`, tokens of a forward pass, its options) -> a dataclass, or dataclasses by name."""
    columns: tuple[Column, ...]
    note: str
    """What the columns are, for the reader of a table."""
    options: tuple[str, ...] = ()
    """Options of `sinkbed probe` that it takes."""
    documents: str = "mixing_documents"
    """The option of `sinkbed probe` that says how many documents are read."""
    while_training: bool = True
    live: Mapping[str, Any] = field(default_factory=dict)
    """Its options while training."""
    live_documents: int | None = None
    """Documents read while training; None: `measure.state_documents`."""
    differentiates: bool = False
    """Takes gradients through the model: left out while training under FSDP2."""

    def metrics(self, result: Any, mode: str) -> dict[str, float]:
        """A result under its metric keys."""
        result, metrics = plain(result), {}
        for column in self.columns:
            for layer, value in enumerate(column.values(result)[1:]):
                if column.log and value is not None:  # without {layer} the last one stays
                    metrics[column.log.format(layer=layer, mode=mode)] = value
        return metrics


def register_measure(name: str, **reading: Any) -> Callable[[Function], Function]:
    """Registers a function as a measure; a result with a number that is not finite is refused.

    Args:
        name: that of the file.
        reading: the other fields of `Measure`.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def measure(model: Any, excerpts: Any, batch_tokens: int, **options: Any) -> Any:
            return finite(function(model, excerpts, batch_tokens, **options), f"{name}, mode {excerpts.mode}")

        MEASURES.register(name)(Measure(measure=measure, **reading))
        return cast(Function, measure)

    return decorate


def measures(*groups: Group) -> dict[str, Measure]:
    """By name, those of one group after those of another."""
    every = {name: MEASURES[name] for name in MEASURES.names}
    return {name: measure for group in groups for name, measure in every.items() if measure.group == group}


def plain(value: Any) -> Any:
    """A result as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(inside) for key, inside in value.items()}
    return [plain(inside) for inside in value] if isinstance(value, list) else value
