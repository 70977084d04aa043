"""A strategy refuses values outside an axis and settings that change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from data.strategy import Strategy


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"packing": "stack"}, "packing: found 'stack'"),
        ({"first_token": "eos"}, "first_token: found 'eos'.*or a token id"),
        ({"first_token": -1}, "first_token: found -1"),
        ({"first_token": True}, "first_token: found True"),
        ({"document_start": "random"}, "document_start: found 'random'"),
        ({"document_end": None}, "document_end: found None"),
        ({"mask": "full"}, "mask: found 'full'"),
        ({"window": 0}, "window: found 0"),
        ({"window": True}, "window: found True"),
        ({"window": 2.0}, "window: found 2.0"),
        ({"shared_prefix": -1}, "shared_prefix: found -1"),
        ({"prefix_lm": -4}, "prefix_lm: found -4"),
        ({"positions": "absolute"}, "positions: found 'absolute'"),
        ({"shared_prefix": 1}, "shared_prefix: found 1 with mask 'causal' and no window"),
        ({"prefix_lm": 1}, "prefix_lm: found 1, which changes nothing"),
    ],
)
def test_a_value_that_is_wrong_or_without_effect_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Strategy(**setting)


def test_a_shared_prefix_has_effect_beside_a_window_or_the_document_mask() -> None:
    assert Strategy(shared_prefix=4, window=8).shared_prefix == 4
    assert Strategy(shared_prefix=1, mask="document").shared_prefix == 1


@pytest.mark.parametrize("setting", [{"window": 16}, {"prefix_lm": 16}, {"shared_prefix": 16, "mask": "document"}])
def test_a_setting_as_long_as_the_row_is_refused_for_that_context(setting: dict[str, Any]) -> None:
    strategy = Strategy(**setting)
    strategy.check_context(17)
    with pytest.raises(ValueError, match="context_length 16"):
        strategy.check_context(16)


def test_a_strategy_cannot_be_changed_and_knows_no_other_axis() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Strategy().mask = "document"  # type: ignore[misc]
    with pytest.raises(TypeError, match="sink"):
        Strategy(sink=True)  # type: ignore[call-arg]
