"""Strategy: how documents become rows and what a query may see. Every axis is independent of the others.

A strategy is plain data. `data.packing` reads the axes that decide the tokens and boundaries of a row;
whoever builds the attention mask reads `mask`, `window`, `shared_prefix` and `prefix_lm`. A setting that
would change nothing is an error here, so that two arms of a study with different strategies really differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Packing = Literal["concat"]
FirstToken = Literal["bos", "none", "random"]
Marker = Literal["bos", "eos", "none"]
MaskKind = Literal["causal", "document"]
Positions = Literal["row", "document"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One choice on each axis of packing and masking.

    Raises ValueError for a value outside its axis and for a setting that has no effect beside the others.
    """

    packing: Packing = "concat"
    """How documents become rows. `concat`: all documents form one stream, cut into rows."""
    first_token: FirstToken | int = "none"
    """What stands at row position 0: `bos` (the same in every row), `random` (a token drawn for each
    row), a token id (the same in every row), or `none` (whatever token of the text falls there)."""
    document_start: Marker = "none"
    """Token put before each document."""
    document_end: Marker = "eos"
    """Token put after each document."""
    mask: MaskKind = "causal"
    """Which keys a query sees: all before it in the row (`causal`) or those of its own document only."""
    window: int | None = None
    """A query sees at most this many keys, itself included. None: no limit."""
    shared_prefix: int = 0
    """Row positions below this are visible to every later query, whatever its document or window."""
    prefix_lm: int = 0
    """Row positions below this see each other in both directions; targets inside are not counted."""
    positions: Positions = "row"
    """Where position 0 is: at the start of the row, or of each document in it."""

    def __post_init__(self) -> None:
        _check_choice("packing", self.packing, get_args(Packing))
        _check_choice("document_start", self.document_start, get_args(Marker))
        _check_choice("document_end", self.document_end, get_args(Marker))
        _check_choice("mask", self.mask, get_args(MaskKind))
        _check_choice("positions", self.positions, get_args(Positions))
        if isinstance(self.first_token, str):
            _check_choice("first_token", self.first_token, get_args(FirstToken), "or a token id")
        else:
            _check_integer("first_token", self.first_token, 0)
        if self.window is not None:
            _check_integer("window", self.window, 1)
        _check_integer("shared_prefix", self.shared_prefix, 0)
        _check_integer("prefix_lm", self.prefix_lm, 0)
        if self.shared_prefix and self.mask == "causal" and self.window is None:
            raise ValueError(
                f"shared_prefix: found {self.shared_prefix} with mask 'causal' and no window, where every query "
                "sees those positions anyway; set mask: document or a window, or shared_prefix: 0"
            )
        if self.prefix_lm == 1:
            raise ValueError(
                "prefix_lm: found 1, which changes nothing (a single position sees itself under any mask); "
                "expected 0 or at least 2"
            )

    def check_context(self, context_length: int) -> None:
        """Raise ValueError where an axis does not fit, or does nothing, in rows of `context_length` tokens."""
        _check_integer("context_length", context_length, 2)
        if self.window is not None and self.window >= context_length:
            raise ValueError(
                f"window: found {self.window} with context_length {context_length}, which limits nothing; "
                f"expected at most {context_length - 1}, or null for no window"
            )
        for name in ("shared_prefix", "prefix_lm"):
            if getattr(self, name) >= context_length:
                raise ValueError(
                    f"{name}: found {getattr(self, name)} with context_length {context_length}; expected at "
                    f"most {context_length - 1}, so that part of the row lies outside it"
                )


def _check_choice(name: str, found: object, choices: tuple[str, ...], extra: str = "") -> None:
    if not isinstance(found, str) or found not in choices:
        expected = ", ".join(map(repr, choices)) + (f" {extra}" if extra else "")
        raise ValueError(f"{name}: found {found!r}, expected one of {expected}")


def _check_integer(name: str, found: object, least: int) -> None:
    # True is an int to Python; as a length or a token id it is a mistake in the config.
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{name}: found {found!r}, expected an integer of at least {least}")
