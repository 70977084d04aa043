"""Inference modes: what is put before the text that a model is measured on."""

from collections.abc import Sequence
from typing import Literal, get_args

from sinkbed.data.pack.strategy import Strategy

InferenceMode = Literal["as_trained", "bos", "text", "first_key_masked", "random_first"]

MODES: tuple[InferenceMode, ...] = get_args(InferenceMode)

MODE_LABELS = {
    "bos": "BOS + text",
    "text": "text",
    "first_key_masked": "as trained, key 0 masked",
    "random_first": "random token + text",
    "as_trained": "as trained",
}


def check_modes(names: Sequence[str]) -> tuple[InferenceMode, ...]:
    """Inference modes by name. Raises ValueError for a name that is none."""
    for name in names:
        if name not in MODES:
            raise ValueError(f"inference mode: expected one of {', '.join(MODES)}; got {name!r}")
    return tuple(mode for name in names for mode in MODES if mode == name)


def first_tokens_of(mode: InferenceMode, strategy: Strategy) -> tuple[str | int, ...]:
    """What a mode puts at row positions 0, 1, ...: `none` where the text goes on, empty where it has them all."""
    by_mode: dict[str, tuple[str | int, ...]] = {"bos": ("bos",), "text": (), "random_first": ("random",)}
    first_tokens = by_mode.get(mode, strategy.first_tokens)
    if mode in ("as_trained", "first_key_masked") and not first_tokens and strategy.document_start != "none":
        return (strategy.document_start,)
    return first_tokens


def placed_positions(mode: InferenceMode, strategy: Strategy) -> tuple[int, ...]:
    """Row positions that a mode puts a token at."""
    return tuple(i for i, what in enumerate(first_tokens_of(mode, strategy)) if what != "none")
