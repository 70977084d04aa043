"""Strategy: how documents become rows and what a query may see. Every axis is independent of the others.

A strategy is plain data. `layout` and `assemble` read the axes that decide the tokens and boundaries
of a row; whoever builds the attention mask reads `mask`, `window`, `shared_prefix` and `prefix_lm`. A setting
that would change nothing is an error here, so that two arms of a study with different strategies really differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sinkbed.data.pack.methods import PACKINGS
from sinkbed.registry import Choice

FirstToken = Literal["bos", "none", "random"]
Marker = Literal["bos", "eos", "none"]
MaskKind = Literal["causal", "intra_document"]
Positions = Literal["row", "document"]
Overflow = Literal["split", "truncate"]
Fill = Literal["pad", "crop", "repeat"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One choice on each axis of packing and masking.

    Raises ValueError for a value outside its axis and for a setting that has no effect beside the others.
    """

    packing: Choice = "concat"
    """How documents become rows, a file of data/pack/methods. `concat`: all documents form one stream, cut into rows.
    `best_fit`: whole documents, each put where it leaves least room (arXiv 2404.10830). `pad`: one document a row.
    `grouped`: whole documents of about the same length share a row."""
    overflow: Overflow = "split"
    """All packings but `concat`: what becomes of a document longer than a row. `split`: pieces of row length,
    and a rest that is packed as a document is. `truncate`: its beginning is kept, so that every row begins
    at a document's start."""
    fill: Fill = "pad"
    """`best_fit`: what stands where no whole document fits. `pad`: padding. `crop`: the shortest waiting document,
    whose rest is dropped. `repeat`: the beginning of a document that also stands elsewhere."""
    first_token: FirstToken | int | list[FirstToken | int] = "none"
    """What stands at row position 0: `bos` (the same in every row), `random` (a token drawn for each
    row), a token id (the same in every row), or `none` (whatever token of the text falls there). A list
    says it for positions 0, 1, ...: `[none, bos]` fixes BOS at position 1, the text flows around it."""
    first_token_share: float = 1.0
    """Share of rows that have the first token, drawn for each row. The others show the text in its place."""
    document_start: Marker | int = "none"
    """Token put before each document: `bos`, `eos`, a token id, or `none`."""
    document_end: Marker | int = "eos"
    """Token put after each document: `bos`, `eos`, a token id, or `none`."""
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

    @property
    def leading(self) -> tuple[FirstToken | int, ...]:
        """`first_token` as what stands at row positions 0, 1, ...; empty where the text has them all."""
        if isinstance(self.first_token, list):
            return tuple(self.first_token)
        return () if self.first_token == "none" else (self.first_token,)

    @property
    def opening(self) -> FirstToken | int:
        """What stands at row position 0."""
        return self.leading[0] if self.leading else "none"

    @property
    def placed(self) -> tuple[int, ...]:
        """Row positions that hold a token which is not of the text."""
        return tuple(i for i, what in enumerate(self.leading) if what != "none")

    def __post_init__(self) -> None:
        PACKINGS.check(self.packing)
        _check_choice("overflow", self.overflow, get_args(Overflow))
        _check_choice("fill", self.fill, get_args(Fill))
        _check_choice("mask", self.mask, get_args(MaskKind))
        _check_choice("positions", self.positions, get_args(Positions))
        for name in ("document_start", "document_end"):
            _check_token(name, getattr(self, name), get_args(Marker))
        self._check_first_token()
        packing = PACKINGS[self.packing]
        if packing.is_stream and self.overflow != "split":
            raise ValueError(
                f"overflow: got {self.overflow!r} with packing {self.packing!r}, which cuts wherever a "
                "row ends; expected another packing, or overflow: split"
            )
        for name, value, other in (("mask", "intra_document", "causal"), ("positions", "document", "row")):
            if not packing.shares_rows and getattr(self, name) == value:
                raise ValueError(
                    f"{name}: got {value!r} with packing {self.packing!r}, where a row holds one document and padding "
                    f"that nothing before it sees; expected {other}"
                )
        if self.fill not in packing.fills:
            raise ValueError(
                f"fill: expected {' or '.join(packing.fills)}, all that packing {self.packing!r} has, got {self.fill!r}"
            )
        if self.window is not None:
            _check_integer("window", self.window, 1)
        _check_integer("shared_prefix", self.shared_prefix, 0)
        _check_integer("prefix_lm", self.prefix_lm, 0)
        if self.shared_prefix and self.mask == "causal" and self.window is None:
            raise ValueError(
                f"shared_prefix: got {self.shared_prefix} with mask 'causal' and no window, where every query "
                "sees those positions anyway; set mask: intra_document or a window, or shared_prefix: 0"
            )
        if self.prefix_lm == 1:
            raise ValueError(
                "prefix_lm: got 1, which changes nothing (a single position sees itself under any mask); "
                "expected 0 or at least 2"
            )

    def _check_first_token(self) -> None:
        if isinstance(self.first_token, list):
            if not self.first_token or self.first_token[-1] == "none":
                raise ValueError(
                    f"first_token: got {self.first_token}, expected a list that ends in a token to place, or none"
                )
            if len(self.first_token) == 1:
                raise ValueError(
                    f"first_token: got {self.first_token}, expected the token itself where a list would hold one"
                )
            for what in self.first_token:
                _check_token("first_token", what, get_args(FirstToken))
        else:
            _check_token("first_token", self.first_token, get_args(FirstToken))
        share: Any = self.first_token_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(
                f"first_token_share: got {share!r}, expected more than 0 and at most 1; for no row at all set "
                "first_token: none"
            )
        if share < 1 and not self.placed:
            raise ValueError(
                f"first_token_share: got {share} with first_token 'none', which has nothing to share; set a "
                "first_token, or first_token_share: 1"
            )

    def check_context(self, context_length: int) -> None:
        """Raise ValueError where an axis does not fit, or does nothing, in rows of `context_length` tokens."""
        _check_integer("context_length", context_length, 2)
        if self.window is not None and self.window >= context_length:
            raise ValueError(
                f"window: got {self.window} with context_length {context_length}, which limits nothing; "
                f"expected at most {context_length - 1}, or null for no window"
            )
        if len(self.leading) >= context_length:
            raise ValueError(
                f"first_token: got {len(self.leading)} positions with context_length {context_length}; expected at "
                f"most {context_length - 1}, so that text is left"
            )
        for name in ("shared_prefix", "prefix_lm"):
            if getattr(self, name) >= context_length:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with context_length {context_length}; expected at "
                    f"most {context_length - 1}, so that part of the row lies outside it"
                )

    def check_vocabulary(self, vocab_size: int, special_ids: tuple[int, ...], where: object) -> None:
        """Raise ValueError where a token id lies outside the vocabulary, or a random one has none to be drawn from."""
        for name, ids in (
            ("first_token", self.leading),
            ("document_start", (self.document_start,)),
            ("document_end", (self.document_end,)),
        ):
            for token in ids:
                if isinstance(token, int) and token >= vocab_size:
                    raise ValueError(
                        f"{name}: got id {token}, expected less than {vocab_size} (the vocabulary of {where})"
                    )
        if "random" in self.leading and vocab_size <= len(special_ids):
            raise ValueError("first_token: got 'random' with a vocabulary of special tokens only")


def _check_choice(name: str, found: object, choices: tuple[str, ...], extra: str = "") -> None:
    if not isinstance(found, str) or found not in choices:
        expected = ", ".join(map(repr, choices)) + (f" {extra}" if extra else "")
        raise ValueError(f"{name}: got {found!r}, expected one of {expected}")


def _check_token(name: str, found: object, choices: tuple[str, ...]) -> None:
    if isinstance(found, str):
        _check_choice(name, found, choices, "or a token id")
    else:
        _check_integer(name, found, 0)


def _check_integer(name: str, found: object, least: int) -> None:
    # True is an int to Python; as a length or a token id it is a mistake in the config.
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{name}: got {found!r}, expected an integer of at least {least}")
