"""Encoding: batches of documents to token ids, in parallel processes, in the order they came.

One tokenizer in each process, its own threads switched off: threads that share a tokenizer wait for each
other's cache. The processes are started afresh (never forked from one that may hold threads), end with
whoever started them, also when that is killed, and are not started at all for a corpus of one batch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sinkbed.data.prepare.slices import slices
from sinkbed.data.source.selection import Batch
from sinkbed.data.store.manifest import token_type
from sinkbed.data.tokenizer import Tokenizer, equivalent

_PARALLEL = "TOKENIZERS_PARALLELISM"


class Encoded(NamedTuple):
    """Token ids of a batch, document after document."""

    tokens: NDArray[np.unsignedinteger]
    """[sum of counts] in the type of the token store."""
    counts: NDArray[np.int64]
    """[documents] tokens of each."""
    sizes: NDArray[np.int64]
    """[documents] UTF-8 bytes of each, after the tokenizer's normaliser."""


class WorkerDiedError(RuntimeError):
    """A process that encodes was killed; the message says what to do."""


class Encoder:
    """Encodes batches in `workers` processes; with one, in the caller's. A context manager.

    Raises ValueError for a document that the tokenizer does not give back, WorkerDiedError.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._first: _Pending | None = None
        self._started = False  # whether the processes have begun to give results
        self._before = os.environ.get(_PARALLEL)

    def __enter__(self) -> Self:
        os.environ[_PARALLEL] = "false"
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = self._before

    def map(
        self,
        batches: Iterable[Batch],
        done: Sequence[int] | set[int] = (),
        seen: Callable[[Encoded], None] = lambda _: None,
    ) -> Iterator[tuple[Batch, Encoded | None]]:
        """Each batch with its tokens, in order; None for the batches of chunks that are `done`.

        Args:
            seen: is told of the tokens as they come, in smaller parts where documents are long.
        """
        pending: deque[_Pending] = deque()
        parts: list[_Pending] = []

        def taken() -> Iterator[tuple[Batch, Encoded | None]]:
            part = pending.popleft()
            parts.append(part)
            part.taken = True
            part.encoded = self._result(part)
            part.texts = None  # of a long document its slices would stay beside it
            if part.encoded is not None:
                seen(part.encoded)
            if part.last:
                joined = _joined(parts)
                parts.clear()
                yield part.batch, joined

        try:
            for batch in batches:
                for part in self._parts(batch, encode=batch.chunk not in done):
                    pending.append(self._submit(part))
                    # One at work in each process, and enough waiting to last while a shard is written.
                    while len(pending) > 4 * self._workers:
                        self._help(pending)
                        yield from taken()
            while pending:
                yield from taken()
        except BrokenProcessPool:
            raise WorkerDiedError(
                "a process that encodes died (killed, perhaps because memory ran out, or it could not start); "
                f"finished shards are kept: run the same command again, with fewer than --workers {self._workers}"
            ) from None

    def _parts(self, batch: Batch, encode: bool) -> Iterator[_Pending]:
        """What is encoded at a time: a batch, or, of one with a long document, slices of it."""
        if not encode:
            yield _Pending(batch, None, last=True)
            return
        texts: list[str] = []
        for document in batch.documents:
            for number, text in enumerate(slices(self._tokenizer, document.text)):
                if number:
                    yield _Pending(batch, texts, last=False)
                    texts = []
                texts.append(text)
        yield _Pending(batch, texts, last=True)

    def _submit(self, pending: _Pending) -> _Pending:
        if pending.texts is None or self._workers == 1:
            return pending
        if self._pool is None and self._first is None:
            self._first = pending
            return pending
        if self._pool is None:
            assert self._first is not None and self._first.texts is not None
            self._pool = ProcessPoolExecutor(
                self._workers,
                get_context("forkserver"),
                _start,
                (self._tokenizer.backend.to_str(), self._tokenizer.bos_id, self._tokenizer.eos_id),
            )
            if not self._first.taken:
                self._first.future = self._pool.submit(_work, self._first.texts)
        pending.future = self._pool.submit(_work, pending.texts)
        return pending

    def _help(self, pending: deque[_Pending]) -> None:
        """Encode from the end of what waits while the processes start, which takes as long as some megabytes do."""
        first = pending[0].future
        if self._started or first is None:
            return
        for other in reversed(pending):
            if first.done():
                break
            if other.future is not None and other.future.cancel():
                assert other.texts is not None
                other.future, other.encoded = None, encode_texts(self._tokenizer, other.texts)
        self._started = True

    def _result(self, pending: _Pending) -> Encoded | None:
        if pending.texts is None or pending.encoded is not None:
            return pending.encoded
        return encode_texts(self._tokenizer, pending.texts) if pending.future is None else pending.future.result()


@dataclass(eq=False)
class _Pending:
    """Texts that are encoded at a time."""

    batch: Batch
    texts: list[str] | None
    """None where no tokens are wanted."""
    last: bool
    """Whether they end the batch."""
    future: Future[Encoded] | None = None
    encoded: Encoded | None = None
    taken: bool = False


def _joined(parts: list[_Pending]) -> Encoded | None:
    """The tokens of a batch."""
    encoded = [part.encoded for part in parts if part.encoded is not None]
    if len(encoded) <= 1:
        return encoded[0] if encoded else None
    ends = np.cumsum([len(e.counts) for e in encoded])[:-1]
    begins = np.delete(np.arange(sum(len(e.counts) for e in encoded)), ends)  # of documents: each part goes on
    counts, sizes = (np.concatenate(columns) for columns in list(zip(*encoded, strict=True))[1:])
    tokens = np.empty(sum(len(e.tokens) for e in encoded), dtype=encoded[0].tokens.dtype)
    encoded.clear()
    filled = 0
    for part in parts:
        if part.encoded is not None:
            end = filled + len(part.encoded.tokens)
            tokens[filled:end], filled = part.encoded.tokens, end
            part.encoded = part.future = None  # all parts of a long document beside it would take twice the memory
    return Encoded(tokens, np.add.reduceat(counts, begins), np.add.reduceat(sizes, begins))


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Encode, and check that the tokens of each text stand for all of its bytes.

    Raises ValueError for a text that the tokenizer does not give back.
    """
    ids = tokenizer.encode_batch(texts)
    counts = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), dtype=token_type(tokenizer.vocab_size), count=int(counts.sum()))
    # Control tokens stand for no byte: one of them among the tokens would leave bytes missing.
    ends = np.cumsum(counts)
    summed = np.concatenate([[0], np.cumsum(tokenizer.token_bytes[tokens], dtype=np.int64)])
    sizes = summed[ends] - summed[ends - counts]
    expected = np.fromiter((len(text.encode()) for text in texts), dtype=np.int64, count=len(texts))
    for index in np.flatnonzero(sizes != expected):
        text = texts[index]
        # Around added tokens a normaliser sees pieces, which it may compose in another way.
        if tokenizer.backend.normalizer is None or not equivalent(tokenizer.decode(ids[index]), text):
            raise ValueError(
                f"tokenizer: expected tokens that stand for the {expected[index]:,} bytes of a document "
                f"({text[:60]!r} …), got {sizes[index]:,}; use another tokenizer"
            )
    return Encoded(tokens, counts, sizes)


_tokenizer: Tokenizer | None = None


def _start(definition: str, bos_id: int, eos_id: int) -> None:
    """Make a process ready: its tokenizer, and a thread that ends it with its parent."""
    global _tokenizer
    os.environ[_PARALLEL] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it to handle
    _tokenizer = Tokenizer.from_str(definition, bos_id=bos_id, eos_id=eos_id)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(texts: list[str]) -> Encoded:
    assert _tokenizer is not None
    return encode_texts(_tokenizer, texts)
