"""The epoch's stream and rows in plain Python, one token at a time: what `data.packing` must equal.

It searches for nothing and computes no offset: it walks the documents, appends each token with the number
of its document, and cuts the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.strategy import Strategy

BOS, EOS = 0, 1
_MARKER = {"bos": [BOS], "eos": [EOS], "none": []}


@dataclass
class OracleRow:
    tokens: list[int]
    targets: list[int]
    loss_mask: list[bool]
    positions: list[int]
    doc_start: list[int]
    doc_end: list[int]
    documents: list[int]
    """Document of each position."""
    stream_positions: list[int]
    """Place in the stream of each stream token of the row."""


def stream_of(documents: Sequence[Sequence[int]], strategy: Strategy) -> list[tuple[int, int]]:
    """(token, document) of the whole epoch."""
    start, end = _MARKER[strategy.document_start], _MARKER[strategy.document_end]
    return [(token, number) for number, document in enumerate(documents) for token in [*start, *document, *end]]


def rows_of(
    documents: Sequence[Sequence[int]], strategy: Strategy, length: int, first_token: int | None = None
) -> list[OracleRow]:
    """Every complete row of the epoch. `first_token`: what stands at position 0, None without one."""
    stream = stream_of(documents, strategy)
    taken = length if first_token is None else length - 1
    rows = []
    begin = 0
    while begin + taken < len(stream):  # the token after the row exists
        inside = stream[begin : begin + taken]
        following = stream[begin + 1 : begin + taken + 1]
        if first_token is not None:
            following = [inside[0], *following]
            inside = [(first_token, inside[0][1]), *inside]
        owners = [document for _, document in inside]
        starts = [owners.index(document) for document in owners]
        counted = []
        for i, (_, target_document) in enumerate(following):
            counts = True
            if strategy.mask == "document" and target_document != owners[i]:
                counts = False
            if strategy.prefix_lm and i + 1 < strategy.prefix_lm:
                counts = False
            if first_token is not None and i == length - 1:
                counts = False  # the first token of the next row predicts it
            counted.append(counts)
        rows.append(
            OracleRow(
                tokens=[token for token, _ in inside],
                targets=[token for token, _ in following],
                loss_mask=counted,
                positions=[i - starts[i] if strategy.positions == "document" else i for i in range(length)],
                doc_start=starts,
                doc_end=[length - owners[::-1].index(document) for document in owners],
                documents=owners,
                stream_positions=list(range(begin, begin + taken)),
            )
        )
        begin += taken
    return rows


def fields_of(row: OracleRow) -> dict[str, list[Any]]:
    """The fields a Batch has too."""
    names = ("tokens", "targets", "loss_mask", "positions", "doc_start", "doc_end")
    return {name: getattr(row, name) for name in names}
