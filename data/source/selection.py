"""Selection: which documents of a source go into a token store, and into which split.

Everything here is a function of the documents in their order, never of how fast or by how many processes
they are encoded. The split is by a hash of each text, so reordering or extending a corpus moves no document
from training to validation, and duplicates fall on the same side.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BATCH_DOCUMENTS = 512
_BATCH_BYTES = 400_000  # encoded at a time: bounds memory, and how long the last process is waited for
_RECENT = 2**16


class Document(NamedTuple):
    """A document that was selected."""

    text: str
    split: str
    size: int
    """UTF-8 bytes of the text."""
    digest: int
    """64-bit hash of the text."""


@dataclass
class Batch:
    """Documents that are encoded together, all of one chunk."""

    chunk: int
    """A chunk is what one shard per split holds."""
    documents: list[Document] = field(default_factory=list)
    last: bool = False
    """Whether the chunk ends with this batch."""


@dataclass
class Selection:
    """The documents that pass, in order."""

    texts: Iterable[str]
    _: KW_ONLY
    validation_share: float
    """Of the documents, by the hash of each."""
    min_bytes: int | None = None
    """The least of a document's UTF-8 bytes; None: no limit."""
    max_bytes: int | None = None
    """The most of them; None: no limit."""
    deduplicate: bool = False
    """Keep only the first of equal texts."""
    normalize: Callable[[str], str] | None = None
    """What the tokenizer makes of a text, which is stored, and decides all else; raises ValueError for a text that it
    would lose some of."""
    skip_changed: bool = False
    """Leave such a text out, and count it."""
    left_out: Counter[str] = field(default_factory=Counter, init=False)
    """Documents left out so far: `changed_by_tokenizer`, `empty` after normalising, `too_short`, `too_long`,
    `duplicate`."""

    def __iter__(self) -> Iterator[Document]:
        seen = Seen()
        for original in self.texts:
            try:
                text = original if self.normalize is None else self.normalize(original)
            except ValueError as error:
                if not self.skip_changed:
                    raise ValueError(f"{error}, or leave such documents out with --on_error skip") from None
                self.left_out["changed_by_tokenizer"] += 1
                continue
            if text is not original and (not text or text.isspace()):
                self.left_out["empty"] += 1
                continue
            content = text.encode()
            size = len(content)
            digest = text_hash(content)
            del content  # not beside a long text for as long as that is encoded
            if self.min_bytes is not None and size < self.min_bytes:
                self.left_out["too_short"] += 1
            elif self.max_bytes is not None and size > self.max_bytes:
                self.left_out["too_long"] += 1
            elif self.deduplicate and not seen.add(digest):
                self.left_out["duplicate"] += 1
            else:
                yield Document(text, "validation" if digest < self.validation_share * 2**64 else "train", size, digest)


class Seen:
    """A set of 64-bit hashes in about 14 bytes each: a sorted array, and a set of those added lately.

    Two different texts share a hash with a probability of n² / 2⁶⁵ over n documents: 3e-6 for ten million.
    """

    def __init__(self) -> None:
        self._sorted: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def add(self, digest: int) -> bool:
        """Whether it is new."""
        if digest in self._recent:
            return False
        if self._sorted.size:
            place = int(self._sorted.searchsorted(np.uint64(digest)))
            if place < self._sorted.size and int(self._sorted[place]) == digest:
                return False
        self._recent.add(digest)
        if len(self._recent) > max(_RECENT, self._sorted.size // 16):
            added = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, np.sort(added)]), kind="stable")
            self._recent = set()
        return True


def batches(documents: Iterable[Document], shard_bytes: int) -> Iterator[Batch]:
    """Cut documents into chunks of at most `shard_bytes` UTF-8 bytes, and those into batches.

    A longer document is a chunk by itself.
    """
    batch = Batch(0)
    size = chunk_size = 0
    for document in documents:
        if batch.documents and chunk_size + document.size > shard_bytes:
            batch.last = True
            yield batch
            batch, size, chunk_size = Batch(batch.chunk + 1), 0, 0
        elif len(batch.documents) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = Batch(batch.chunk), 0
        batch.documents.append(document)
        size += document.size
        chunk_size += document.size
    if batch.documents:
        batch.last = True
        yield batch


def text_hash(content: bytes) -> int:
    """blake2b of a text's UTF-8 bytes, as a number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
