"""The epoch's stream and rows in plain Python, one token at a time: what `data.pack.assemble` must equal.

It searches for nothing and computes no offset: it walks the documents, appends each token with the number
of its document, and cuts the list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sinkbed.data.pack.strategy import Strategy

BOS, EOS = 0, 1


def marker(what: str | int) -> list[int]:
    """The tokens that a document start or end means."""
    return {"bos": [BOS], "eos": [EOS], "none": []}[what] if isinstance(what, str) else [what]


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
    start, end = marker(strategy.document_start), marker(strategy.document_end)
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
            if strategy.mask == "intra_document" and target_document != owners[i]:
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


@dataclass(eq=False)
class Piece:
    """Tokens `begin` to `end` of a document with its markers."""

    document: int
    begin: int
    end: int
    repeated: bool = False


def marked(document: Sequence[int], strategy: Strategy) -> list[int]:
    """A document with the tokens put before and after it."""
    return [*marker(strategy.document_start), *document, *marker(strategy.document_end)]


def pieces_of(documents: Sequence[Sequence[int]], strategy: Strategy, room: int) -> list[Piece]:
    """What a packing that keeps documents whole lays out, in store order."""
    found = []
    for number, document in enumerate(documents):
        size = len(marked(document, strategy))
        begins = range(0, size, room) if strategy.overflow == "split" else [0][: size > 0]
        found += [Piece(number, begin, min(begin + room, size)) for begin in begins]
    return found


def laid_out(documents: Sequence[Sequence[int]], strategy: Strategy, room: int, waiting: int) -> list[list[Piece]]:
    """Rows of pieces, laid out one after the other."""
    pieces = pieces_of(documents, strategy, room)
    sizes = [piece.end - piece.begin for piece in pieces]
    numbers = range(len(pieces))
    if strategy.packing == "pad":
        rows = [[i] for i in numbers]
    elif strategy.packing == "grouped":
        rows = []
        for i in sorted(numbers, key=lambda i: sizes[i]):
            if not rows or sum(sizes[j] for j in rows[-1]) + sizes[i] > room:
                rows.append([])
            rows[-1].append(i)
    elif strategy.fill == "crop":
        return _from_buffer(pieces, room, waiting)
    else:
        rows = [sorted(row) for row in _best_fit(sizes, room)]
    laid = [[pieces[i] for i in row] for row in rows]
    if strategy.fill == "repeat":
        _fill_up(laid, [piece for piece in pieces if piece.begin == 0], room)
    return laid


def _best_fit(sizes: list[int], room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room of each row, and when it came to have it
    for time, i in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        fitting = [(*left[row], row) for row in range(len(rows)) if left[row][0] >= sizes[i]]
        if fitting:
            row = min(fitting)[2]
        else:
            row = len(rows)
            rows.append([])
            left.append((room, time))
        rows[row].append(i)
        left[row] = (left[row][0] - sizes[i], time)
    return rows


def _from_buffer(pieces: list[Piece], room: int, waiting: int) -> list[list[Piece]]:
    buffer, rest = pieces[:waiting], pieces[waiting:]
    rows = []
    while buffer:
        row: list[Piece] = []
        left = room
        while left and buffer:
            fitting = [piece for piece in buffer if piece.end - piece.begin <= left]
            # Of equals `max` and `min` give the first.
            chosen = (max if fitting else min)(fitting or buffer, key=lambda piece: piece.end - piece.begin)
            buffer.remove(chosen)
            buffer += rest[:1]
            rest = rest[1:]
            row.append(Piece(chosen.document, chosen.begin, min(chosen.end, chosen.begin + left)))
            left -= row[-1].end - row[-1].begin
        rows.append(row)
    return rows


def _fill_up(rows: list[list[Piece]], heads: list[Piece], room: int) -> None:
    following = 0
    for row in rows:
        while (left := room - sum(piece.end - piece.begin for piece in row)) > 0:
            head = heads[following % len(heads)]
            row.append(Piece(head.document, 0, min(head.end, left), repeated=True))
            following += 1


def planned_row(
    documents: Sequence[Sequence[int]],
    strategy: Strategy,
    length: int,
    pieces: list[Piece],
    first_tokens: list[int | None],
) -> OracleRow:
    """One row, position by position. `first_tokens`: what stands at positions 0, 1, ...; None for text."""
    room = length - len(strategy.placed)
    texts = [marked(document, strategy) for document in documents]
    content = [(piece, place) for piece in pieces for place in range(piece.begin, piece.end)]
    placed = [i < len(first_tokens) and first_tokens[i] is not None for i in range(length)]
    following = iter(content)
    # What of the documents stands at each position.
    held = [None if is_placed else next(following, None) for is_placed in placed]
    inputs = len(content)
    last = max(i for i, what in enumerate(held) if what)
    # A placed token belongs to what follows it; behind the last token, to it where the row is full.
    owners: list[int] = []
    for i in range(length):
        ahead = next((what for what in held[i:] if what), None)
        if ahead is not None:
            owners.append(pieces.index(ahead[0]))
        else:
            owners.append(len(pieces) - 1 if inputs == length - sum(placed) else len(pieces))
    tail, _ = content[-1]
    goes_on = strategy.overflow == "split" and tail.end - tail.begin == room and tail.end < len(texts[tail.document])
    targets, counted = [], []
    for i in range(length):
        ahead = held[i + 1] if i + 1 < length else None
        if ahead is not None:
            piece, place = ahead
            targets.append(texts[piece.document][place])
            begins = place == piece.begin
            counts = not begins or (place == 0 and (placed[i] or strategy.mask == "causal"))
            counts = counts and (held[i] is not None or placed[i])
        elif i == last and goes_on and not (i + 1 < length and placed[i + 1]):
            targets.append(texts[tail.document][tail.end])
            counts = True
        else:
            targets.append(-1)
            counts = False
        counted.append(counts and not (strategy.prefix_lm and i + 1 < strategy.prefix_lm))
    starts = [owners.index(owner) for owner in owners]
    return OracleRow(
        tokens=[
            first_tokens[i] if placed[i] else texts[what[0].document][what[1]] if (what := held[i]) else EOS  # type: ignore[misc]
            for i in range(length)
        ],
        targets=targets,
        loss_mask=counted,
        positions=[i - starts[i] if strategy.positions == "document" else i for i in range(length)],
        doc_start=starts,
        doc_end=[length - owners[::-1].index(owner) for owner in owners],
        documents=owners,
        stream_positions=[],
    )
