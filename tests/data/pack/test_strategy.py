"""A strategy refuses values outside an axis and settings that change nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from sinkbed.data.pack.strategy import Strategy
from tests.support import ROOT


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"packing": "stack"},
            "data.strategy.packing: expected one of best_fit, concat, grouped, pad, .*; got 'stack'",
        ),
        ({"first_token": "eos"}, "first_token: expected one of .*a token id, got 'eos'"),
        ({"first_token": "a token id"}, "first_token: expected one of bos, none, random, or a token id, got"),
        ({"first_token": -1}, "first_token: expected .*, got -1"),
        ({"first_token": True}, "first_token: expected .*, got True"),
        ({"document_start": "random"}, "document_start: expected .*, got 'random'"),
        ({"document_end": None}, "document_end: expected .*, got None"),
        ({"mask": "full"}, "mask: expected .*, got 'full'"),
        ({"window": 0}, "window: expected .*, got 0"),
        ({"window": True}, "window: expected .*, got True"),
        ({"window": 2.0}, "window: expected .*, got 2.0"),
        ({"shared_prefix": -1}, "shared_prefix: expected .*, got -1"),
        ({"prefix_lm": -4}, "prefix_lm: expected .*, got -4"),
        ({"positions": "absolute"}, "positions: expected .*, got 'absolute'"),
        ({"shared_prefix": 1}, "shared_prefix: expected 0 with mask causal and no window.* got 1"),
        ({"prefix_lm": 1}, "prefix_lm: expected 0 or at least 2, got 1, which changes nothing"),
        ({"overflow": "truncate"}, "overflow: expected split with packing 'concat'.* got 'truncate'"),
        ({"overflow": "drop", "packing": "pad"}, "overflow: expected .*, got 'drop'"),
        ({"fill": "repeat", "packing": "grouped"}, "fill: expected pad, all that packing 'grouped' has, got 'repeat'"),
        ({"fill": "crop"}, "fill: expected pad, all that packing 'concat' has, got 'crop'"),
        ({"first_token": []}, "first_token: expected .*ends in a token to place.* got"),
        ({"first_token": ["bos", "none"]}, "first_token: expected .*ends in a token to place.* got"),
        ({"first_token": ["bos", "eos"]}, "first_token: expected .*, got 'eos'"),
        ({"first_token": ["bos"]}, "first_token: expected the token itself"),
        (
            {"packing": "pad", "mask": "intra_document"},
            "mask: expected causal with packing 'pad'.* got 'intra_document'",
        ),
        ({"packing": "pad", "positions": "document"}, "positions: expected row with packing 'pad'.* got 'document'"),
        ({"first_token": "bos", "first_token_share": 0}, "first_token_share: expected .*, got 0"),
        ({"first_token": "bos", "first_token_share": 1.5}, "first_token_share: expected .*, got 1.5"),
        ({"first_token": "bos", "first_token_share": True}, "first_token_share: expected .*, got True"),
        ({"first_token_share": 0.5}, "first_token_share: expected 1 with first_token none.* got 0.5"),
        ({"document_start": -3}, "document_start: expected .*, got -3"),
    ],
)
def test_a_value_that_is_wrong_or_without_effect_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Strategy(**setting)


def test_a_shared_prefix_has_effect_beside_a_window_or_the_document_mask() -> None:
    assert Strategy(shared_prefix=4, window=8).shared_prefix == 4
    assert Strategy(shared_prefix=1, mask="intra_document").shared_prefix == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"window": 16},
        {"prefix_lm": 16},
        {"shared_prefix": 16, "mask": "intra_document"},
        {"first_token": [*["none"] * 15, "bos"]},
    ],
)
def test_a_setting_as_long_as_the_row_is_refused_for_that_context(setting: dict[str, Any]) -> None:
    strategy = Strategy(**setting)
    strategy.check_context(17)
    with pytest.raises(ValueError, match="context_length 16"):
        strategy.check_context(16)


def test_a_strategy_cannot_be_changed_and_knows_no_other_axis() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Strategy().mask = "intra_document"  # type: ignore[misc]
    with pytest.raises(TypeError, match="sink"):
        Strategy(sink=True)  # type: ignore[call-arg]


def test_what_stands_at_leading_positions_is_one_list_however_it_is_written() -> None:
    assert (Strategy().first_tokens, Strategy().placed, Strategy().first_of_row) == ((), (), "none")
    bos = Strategy(first_token="bos")
    assert (bos.first_tokens, bos.placed, bos.first_of_row) == (("bos",), (0,), "bos")
    later = Strategy(first_token=["none", 7, "none", "random"])
    assert (later.placed, later.first_of_row) == ((1, 3), "none")


def test_a_token_id_outside_the_vocabulary_is_refused() -> None:
    for setting in ({"first_token": ["none", 300]}, {"document_start": 300}, {"document_end": 300}):
        [name] = setting
        with pytest.raises(ValueError, match=f"{name}: expected an id less than 258 .* got 300"):
            Strategy(**setting).check_vocabulary(258, (0, 1), "stores/x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="special tokens only"):
        Strategy(first_token="random").check_vocabulary(2, (0, 1), "stores/x")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_strategy_in_the_checkout_is_valid_and_commented(path: Path) -> None:
    """Whole, too: what an overlay leaves out it would take over from the run it is laid upon."""
    text = path.read_text()
    assert text.startswith("# ")
    strategy = yaml.safe_load(text)["data"]["strategy"]
    assert strategy.keys() == {field.name for field in dataclasses.fields(Strategy)}
    Strategy(**strategy).check_context(128)
