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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data.selection import Batch
from data.tokenizer import Tokenizer, equivalent, token_dtype

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = self._before

    def map(
        self, batches: Iterable[Batch], done: Sequence[int] | set[int] = ()
    ) -> Iterator[tuple[Batch, Encoded | None]]:
        """Each batch with its tokens, in order; None for the batches of units that are `done`."""
        pending: deque[_Pending] = deque()
        try:
            for batch in batches:
                pending.append(self._submit(batch, encode=batch.unit not in done))
                # One at work in each process, and enough waiting to last while a shard is written.
                while len(pending) > 4 * self._workers:
                    self._help(pending)
                    yield self._result(pending.popleft())
            while pending:
                yield self._result(pending.popleft())
        except BrokenProcessPool:
            raise WorkerDiedError(
                "a process that encodes died (killed, perhaps because memory ran out, or it could not start); "
                f"finished shards are kept: run the same command again, with fewer than --workers {self._workers}"
            ) from None

    def _submit(self, batch: Batch, encode: bool) -> _Pending:
        pending = _Pending(batch, encode)
        if not encode or self._workers == 1:
            return pending
        if self._pool is None and self._first is None:
            self._first = pending
            return pending
        if self._pool is None:
            assert self._first is not None
            self._pool = ProcessPoolExecutor(
                self._workers,
                get_context("forkserver"),
                _start,
                (self._tokenizer.backend.to_str(), self._tokenizer.bos_id, self._tokenizer.eos_id),
            )
            if not self._first.taken:
                self._first.future = self._pool.submit(_work, _texts(self._first.batch))
        pending.future = self._pool.submit(_work, _texts(batch))
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
                other.future, other.encoded = None, encode_texts(self._tokenizer, _texts(other.batch))
        self._started = True

    def _result(self, pending: _Pending) -> tuple[Batch, Encoded | None]:
        pending.taken = True
        if not pending.encode:
            return pending.batch, None
        if pending.encoded is not None:
            return pending.batch, pending.encoded
        if pending.future is None:
            return pending.batch, encode_texts(self._tokenizer, _texts(pending.batch))
        return pending.batch, pending.future.result()


class _Pending:
    def __init__(self, batch: Batch, encode: bool) -> None:
        self.batch = batch
        self.encode = encode
        self.future: Future[Encoded] | None = None
        self.encoded: Encoded | None = None
        self.taken = False


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Encode, and check that the tokens of each text stand for all of its bytes.

    Raises ValueError for a text that the tokenizer does not give back.
    """
    ids = tokenizer.encode_batch(texts)
    counts = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), dtype=token_dtype(tokenizer), count=int(counts.sum()))
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
                f"tokenizer: found a document of {expected[index]:,} bytes whose tokens stand for {sizes[index]:,} "
                f"({text[:60]!r} …), expected one that loses nothing; use another tokenizer"
            )
    return Encoded(tokens, counts, sizes)


def _texts(batch: Batch) -> list[str]:
    return [document.text for document in batch.documents]


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
