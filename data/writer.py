"""Writing a token store: all or nothing, shard by shard.

Everything is written into a sibling folder `.NAME.partial`, flushed to the disk and renamed at the end,
so what stands under the final name is complete. The partial folder is locked while a writer lives; what
a killed one left behind is cleared by the next. Memory: one shard per split.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardInfo,
    SplitInfo,
    sha256_file,
    sha256_json,
)
from data.tokenizer import Tokenizer

SHARD_TOKENS = 2**26


class DiskFullError(OSError):
    """No space or quota left; the message says what became of the token store and what to do."""


class StoreWriter:
    """Context manager that builds a token store; nothing is visible at `out` until `finish`.

        with StoreWriter(out, tokenizer) as writer:
            writer.add("train", ids, len(text.encode()))
            manifest = writer.finish(recipe=recipe)

    Leaving without `finish`, for whatever reason, removes all that was written.

    Args:
        shard_tokens: a shard is closed before it would hold more; a longer document has one of its own.
        replace: take the place of a token store already at `out`.

    Raises FileExistsError where `out` is taken, BlockingIOError where another process is writing it, and
    DiskFullError when there is no space left.
    """

    def __init__(
        self, out: Path | str, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS, replace: bool = False
    ) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
        self.out = Path(os.path.abspath(out))
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._replace = replace
        self._partial = self.out.parent / f".{self.out.name}.partial"
        self._pending: dict[str, _Pending] = {}
        self._shards: dict[str, list[ShardInfo]] = {}
        self._lock: Any = None
        self._finished = False

    def __enter__(self) -> Self:
        _refuse_taken(self.out, self._replace)
        with _clear_full_disk(self.out):
            self._partial.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._partial / ".lock", "w")  # held until __exit__
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise BlockingIOError(
                    errno.EWOULDBLOCK, f"another process is preparing {self.out}; wait for it or choose another --out"
                ) from None
            for stale in self._partial.iterdir():
                if stale.name != ".lock":
                    _remove(stale)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._lock.close()

    def add(self, split: str, tokens: Sequence[int] | NDArray[np.integer], byte_count: int) -> None:
        """Append a document. Raises ValueError for an id that the vocabulary lacks or reserves as special."""
        array = np.asarray(tokens, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.tokenizer.vocab_size):
            raise ValueError(
                f"document with token ids {array.min()} to {array.max()}: expected 0 to {self.tokenizer.vocab_size - 1}"
            )
        if any((array == special).any() for special in self.tokenizer.special_ids):
            raise ValueError(
                f"document with a special token ({self.tokenizer.special_ids}): expected text only; the strategy "
                "adds special tokens when rows are made"
            )
        pending = self._pending.setdefault(split, _Pending())
        if pending.documents and pending.tokens + array.size > self.shard_tokens:
            self._close_shard(split)
        pending.add(array.astype(self.dtype), byte_count)

    def finish(self, *, recipe: dict[str, Any], skipped_documents: int = 0) -> Manifest:
        """Write the rest, flush, and give the token store its name."""
        with _clear_full_disk(self.out):
            for split, pending in self._pending.items():
                if pending.documents:
                    self._close_shard(split)
            self.tokenizer.save(self._partial / TOKENIZER_NAME)
            _flush(self._partial / TOKENIZER_NAME)
            manifest = Manifest(
                recipe=recipe,
                fingerprint=sha256_json(recipe),
                tokenizer_sha256=self.tokenizer.sha256,
                vocab_size=self.tokenizer.vocab_size,
                bos_id=self.tokenizer.bos_id,
                eos_id=self.tokenizer.eos_id,
                special_ids=self.tokenizer.special_ids,
                dtype=self.dtype.name,
                skipped_documents=skipped_documents,
                splits={split: _sum(shards) for split, shards in self._shards.items()},
            )
            manifest.write(self._partial)
            for folder in (*(self._partial / split for split in self._shards), self._partial):
                _flush(folder)
            previous = self._publish()
        # The store stands. Its name is made durable before what it replaces goes.
        (self.out / ".lock").unlink(missing_ok=True)
        _flush(self.out.parent)
        _remove(previous)
        return manifest

    def _close_shard(self, split: str) -> None:
        pending = self._pending[split]
        shards = self._shards.setdefault(split, [])
        name = f"{split}/{len(shards):05d}.arrow"
        path = self._partial / name
        with _clear_full_disk(self.out):
            path.parent.mkdir(exist_ok=True)
            _write_shard(path, pending, self.dtype)
            shards.append(
                ShardInfo(
                    file=name,
                    size=path.stat().st_size,
                    sha256=sha256_file(path),
                    documents=pending.documents,
                    tokens=pending.tokens,
                    bytes=sum(pending.byte_counts),
                )
            )
        pending.clear()

    def _publish(self) -> Path:
        """Rename the partial folder to its final name. Returns where the store that stood there is now, if any."""
        previous = self.out.parent / f".{self.out.name}.previous"
        _remove(previous)
        if self.out.exists():
            _refuse_taken(self.out, self._replace)
            os.rename(self.out, previous)
        try:
            os.rename(self._partial, self.out)
        except OSError:
            if previous.exists():
                os.rename(previous, self.out)
            raise
        self._finished = True
        return previous


class _Pending:
    """Documents of the shard being filled."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.arrays: list[NDArray[Any]] = []
        self.byte_counts: list[int] = []
        self.tokens = 0

    @property
    def documents(self) -> int:
        return len(self.arrays)

    def add(self, array: NDArray[Any], byte_count: int) -> None:
        self.arrays.append(array)
        self.byte_counts.append(byte_count)
        self.tokens += array.size


def _write_shard(path: Path, pending: _Pending, dtype: np.dtype[Any]) -> None:
    """One record batch: the `tokens` of a document are a slice of one values buffer."""
    offsets = np.cumsum([0, *(array.size for array in pending.arrays)], dtype=np.int64)
    values = np.concatenate(pending.arrays) if pending.arrays else np.zeros(0, dtype=dtype)
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
    batch = pa.record_batch([tokens, pa.array(pending.byte_counts, pa.int64())], names=["tokens", "bytes"])
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _sum(shards: list[ShardInfo]) -> SplitInfo:
    return SplitInfo(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )


def _refuse_taken(out: Path, replace: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    # Only a token store is ever replaced: --force with a mistyped folder must not delete it.
    if not (out / MANIFEST_NAME).is_file():
        raise FileExistsError(
            f"{out}: found something that is no token store, expected nothing or a token store; choose another --out"
        )
    if not replace:
        raise FileExistsError(f"{out}: found a token store; choose another --out, or --force to replace it")


@contextmanager
def _clear_full_disk(out: Path) -> Iterator[None]:
    """Turn a full disk or quota, met anywhere inside, into one message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            error.errno,
            f"the disk is full: the token store {out} was not made and what was written is removed; free space "
            "(about 2.2 bytes per token with a vocabulary of up to 65,536, else 4.2) or choose another --out",
        ) from error


def _flush(path: Path) -> None:
    """fsync a file or folder, so that the rename that follows never precedes the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
