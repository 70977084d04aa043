"""Slices: a long document in parts whose tokens, joined, are those of the uncut.

Encoding takes some 200 bytes of memory for each byte of a text, so a document is encoded in slices. It is cut
where nothing that the tokenizer does reaches across: where a word of its pre-tokenizer begins, or, without
one, between two characters that stand side by side in no token of the vocabulary. The tokens of the
neighbourhood have to be the same, cut or uncut, which tells of tokens added by hand.
"""

import unicodedata
from collections.abc import Iterator

from sinkbed.data.tokenizer import Tokenizer

SLICE = 2**18  # characters, about as many as a batch of documents has
LONGEST = 2**22  # characters without a place to cut, at most
_CONTEXT = 2**10  # characters on each side of a cut that are compared


def slices(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """The parts of a text, about `SLICE` characters each.

    Raises ValueError for a text without a place to cut in `LONGEST` characters.
    """
    begin, end = 0, -1
    while end < len(text):
        end = len(text) if len(text) - begin <= SLICE + _CONTEXT else _place(tokenizer, text, begin)
        yield text[begin:end]
        begin = end


def _place(tokenizer: Tokenizer, text: str, begin: int) -> int:
    """Where to cut a text that goes on at `begin`; its end where it is near and there is no other place."""
    for middle in range(begin + SLICE, min(begin + LONGEST, len(text)), _CONTEXT):
        first = middle - _CONTEXT
        window = text[first : middle + _CONTEXT]
        uncut = None
        for place in _candidates(tokenizer, window):
            uncut = uncut or tokenizer.encode(window)
            if tokenizer.encode(window[:place]) + tokenizer.encode(window[place:]) == uncut:
                return first + place
    if len(text) - begin <= LONGEST:
        return len(text)
    raise ValueError(
        f"tokenizer: expected a place to cut a document at least every {LONGEST:,} characters, so that memory is "
        f"bounded, got none from character {begin:,} on ({text[begin : begin + 40]!r} …); leave such documents out "
        "with max_bytes, or break their lines"
    )


def _candidates(tokenizer: Tokenizer, window: str) -> Iterator[int]:
    """Places in the middle half of a window, the middle first, across which no token can reach."""
    starts, pairs = tokenizer.word_starts(window), tokenizer.pairs
    half = len(window) // 2
    for place in sorted(range(half // 2 + 1, half + half // 2), key=lambda place: abs(place - half)):
        before, after = window[place - 1], window[place]
        # Words inside a run, of three digits say, are counted from its beginning, which the window may lack.
        changes = unicodedata.category(before)[0] != unicodedata.category(after)[0]
        if (place in starts and changes) or (pairs is not None and (before, after) not in pairs):
            yield place
