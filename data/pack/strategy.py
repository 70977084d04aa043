"""Strategy: how documents become rows and what a query may see. Every axis is independent of the others.

A strategy is plain data. `layout` and `assemble` read the axes that decide the tokens and boundaries
of a row; whoever builds the attention mask reads `mask`, `window`, `shared_prefix` and `prefix_lm`. A setting
that would change nothing is an error here, so that two arms of a study with different strategies really differ.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sinkbed.data.pack.methods import PACKINGS
from sinkbed.ranges import check_choice, check_number
from sinkbed.registry import Choice, plain

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
    def first_tokens(self) -> tuple[FirstToken | int, ...]:
        """`first_token` as what stands at row positions 0, 1, ...; empty where the text has them all."""
        if isinstance(self.first_token, list):
            return tuple(self.first_token)
        return () if self.first_token == "none" else (self.first_token,)

    @property
    def first_of_row(self) -> FirstToken | int:
        """What stands at row position 0."""
        return self.first_tokens[0] if self.first_tokens else "none"

    @property
    def placed(self) -> tuple[int, ...]:
        """Row positions that hold a token which is not of the text."""
        return tuple(i for i, what in enumerate(self.first_tokens) if what != "none")

    def __post_init__(self) -> None:
        object.__setattr__(self, "packing", plain(self.packing))
        packing = PACKINGS.make(self.packing, self.fill)
        check_choice("data.strategy.overflow", self.overflow, get_args(Overflow))
        check_choice("data.strategy.fill", self.fill, get_args(Fill))
        check_choice("data.strategy.mask", self.mask, get_args(MaskKind))
        check_choice("data.strategy.positions", self.positions, get_args(Positions))
        for name in ("document_start", "document_end"):
            _check_token(name, getattr(self, name), get_args(Marker))
        self._check_first_token()
        if packing.is_stream and self.overflow != "split":
            raise ValueError(
                f"data.strategy.overflow: expected split with packing {self.packing!r}, which cuts wherever a row "
                f"ends, got {self.overflow!r}"
            )
        for name, value, other in (("mask", "intra_document", "causal"), ("positions", "document", "row")):
            if not packing.shares_rows and getattr(self, name) == value:
                raise ValueError(
                    f"data.strategy.{name}: expected {other} with packing {self.packing!r}, where a row holds one "
                    f"document and padding that nothing before it sees, got {value!r}"
                )
        if self.fill not in packing.fills:
            raise ValueError(
                f"data.strategy.fill: expected {' or '.join(packing.fills)}, all that packing {self.packing!r} has, "
                f"got {self.fill!r}"
            )
        if self.window is not None:
            check_number("data.strategy.window", self.window, least=1, integer=True)
        check_number("data.strategy.shared_prefix", self.shared_prefix, least=0, integer=True)
        check_number("data.strategy.prefix_lm", self.prefix_lm, least=0, integer=True)
        if self.shared_prefix and self.mask == "causal" and self.window is None:
            raise ValueError(
                "data.strategy.shared_prefix: expected 0 with mask causal and no window, where every query sees "
                f"those positions anyway, got {self.shared_prefix}; set mask: intra_document or a window"
            )
        if self.prefix_lm == 1:
            raise ValueError(
                "data.strategy.prefix_lm: expected 0 or at least 2, got 1, which changes nothing: a single position "
                "sees itself under any mask"
            )

    def _check_first_token(self) -> None:
        if isinstance(self.first_token, list):
            if not self.first_token or self.first_token[-1] == "none":
                raise ValueError(
                    "data.strategy.first_token: expected a list that ends in a token to place, or none, got "
                    f"{self.first_token}"
                )
            if len(self.first_token) == 1:
                raise ValueError(
                    "data.strategy.first_token: expected the token itself where a list would hold one, got "
                    f"{self.first_token}"
                )
        for what in self.first_tokens:
            _check_token("first_token", what, get_args(FirstToken))
        check_number("data.strategy.first_token_share", self.first_token_share, above=0, most=1)
        if self.first_token_share < 1 and not self.placed:
            raise ValueError(
                "data.strategy.first_token_share: expected 1 with first_token none, which has nothing to share, got "
                f"{self.first_token_share}; set a first_token"
            )

    def check_context(self, context_length: int) -> None:
        """Raise ValueError where an axis does not fit, or does nothing, in rows of `context_length` tokens."""
        check_number("data.context_length", context_length, least=2, integer=True)
        if self.window is not None and self.window >= context_length:
            raise ValueError(
                f"data.strategy.window: expected at most {context_length - 1} with context_length {context_length}, "
                f"got {self.window}, which limits nothing; null for no window"
            )
        if len(self.first_tokens) >= context_length:
            raise ValueError(
                f"data.strategy.first_token: expected at most {context_length - 1} positions with context_length "
                f"{context_length}, so that text is left, got {len(self.first_tokens)}"
            )
        for name in ("shared_prefix", "prefix_lm"):
            if getattr(self, name) >= context_length:
                raise ValueError(
                    f"data.strategy.{name}: expected at most {context_length - 1} with context_length "
                    f"{context_length}, so that part of the row lies outside it, got {getattr(self, name)}"
                )

    def check_vocabulary(self, vocab_size: int, special_ids: tuple[int, ...], where: object) -> None:
        """Raise ValueError where a token id lies outside the vocabulary, or a random one has none to be drawn from."""
        for name, ids in (
            ("first_token", self.first_tokens),
            ("document_start", (self.document_start,)),
            ("document_end", (self.document_end,)),
        ):
            for token in ids:
                if isinstance(token, int) and token >= vocab_size:
                    raise ValueError(
                        f"data.strategy.{name}: expected an id less than {vocab_size} (the vocabulary of {where}), "
                        f"got {token}"
                    )
        if "random" in self.first_tokens and vocab_size <= len(special_ids):
            raise ValueError(
                "data.strategy.first_token: expected no random one with a vocabulary of special tokens only, got random"
            )


def _check_token(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if isinstance(value, str) and value not in choices:
        raise ValueError(f"data.strategy.{name}: expected one of {', '.join(choices)}, or a token id, got {value!r}")
    if not isinstance(value, str):
        check_number(f"data.strategy.{name}", value, least=0, integer=True)
