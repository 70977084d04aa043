"""Writing a token store from documents at hand, in one go. Memory: one shard per split.

`prepare` does it from a source, by many processes, and goes on where it was stopped; both write into a
`staging.StagingFolder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sinkbed.data.files import sha256_json
from sinkbed.data.prepare.encoding import token_dtype
from sinkbed.data.prepare.staging import StagingFolder
from sinkbed.data.store.manifest import Manifest, ShardInfo, SplitInfo
from sinkbed.data.tokenizer import Tokenizer
from sinkbed.ranges import check_number

SHARD_TOKENS = 2**26


class StoreWriter:
    """Context manager that builds a token store, document by document; nothing is visible at `out` until `finish`.

        with StoreWriter(out, tokenizer) as writer:
            writer.add("train", ids, len(text.encode()))
            manifest = writer.finish(recipe=recipe)

    Leaving without `finish`, for whatever reason, removes all that was written.

    Args:
        shard_tokens: a shard is closed before it would hold more; a longer document has one of its own.
        replace: take the place of a token store already at `out`.

    Raises as `StagingFolder`.
    """

    def __init__(
        self, out: Path | str, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS, replace: bool = False
    ) -> None:
        check_number("shard_tokens", shard_tokens, least=1)
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.dtype = token_dtype(tokenizer)
        self._staging = StagingFolder(out, replace=replace)
        self._pending: dict[str, _Pending] = {}
        self._shards: dict[str, list[ShardInfo]] = {}
        self._finished = False

    def __enter__(self) -> Self:
        self._staging.__enter__()
        self._staging.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._staging.discard()
        self._staging.__exit__(kind, error, trace)

    def add(self, split: str, tokens: Sequence[int] | NDArray[np.integer], byte_count: int) -> None:
        """Append a document. Raises ValueError for an id that the vocabulary lacks or reserves as special."""
        array = np.asarray(tokens, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.tokenizer.vocab_size):
            raise ValueError(
                f"document: expected token ids from 0 to {self.tokenizer.vocab_size - 1}, got {array.min()} to "
                f"{array.max()}"
            )
        if any((array == special).any() for special in self.tokenizer.special_ids):
            raise ValueError(
                f"document: expected text only, got a special token ({self.tokenizer.special_ids}); the strategy adds "
                "them when rows are made"
            )
        pending = self._pending.setdefault(split, _Pending())
        if pending.arrays and pending.tokens + array.size > self.shard_tokens:
            self._close_shard(split)
        pending.add(array.astype(self.dtype), byte_count)

    def finish(self, *, recipe: dict[str, Any], left_out: dict[str, int] | None = None) -> Manifest:
        """Write the rest, flush, and give the token store its name."""
        for split, pending in self._pending.items():
            if pending.arrays:
                self._close_shard(split)
        self._staging.write_tokenizer(self.tokenizer)
        manifest = self._staging.publish(manifest_of(recipe, self.tokenizer, self._shards, left_out or {}))
        self._finished = True
        return manifest

    def _close_shard(self, split: str) -> None:
        pending = self._pending[split]
        shards = self._shards.setdefault(split, [])
        counts = np.array([array.size for array in pending.arrays], dtype=np.int64)
        sizes = np.array(pending.byte_counts, dtype=np.int64)
        name = shard_name(split, len(shards))
        shards.append(self._staging.write_shard(name, np.concatenate(pending.arrays), counts, sizes))
        pending.clear()


class _Pending:
    """Documents of the shard being filled."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.arrays: list[NDArray[Any]] = []
        self.byte_counts: list[int] = []
        self.tokens = 0

    def add(self, array: NDArray[Any], byte_count: int) -> None:
        self.arrays.append(array)
        self.byte_counts.append(byte_count)
        self.tokens += array.size


def shard_name(split: str, number: int) -> str:
    """Path of a shard inside its token store."""
    return f"{split}/{number:05d}.arrow"


def manifest_of(
    recipe: dict[str, Any], tokenizer: Tokenizer, shards: dict[str, list[ShardInfo]], left_out: dict[str, int]
) -> Manifest:
    """The manifest of a store of these shards per split."""
    return Manifest(
        recipe=recipe,
        fingerprint=sha256_json(recipe),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        special_ids=tokenizer.special_ids,
        control_tokens=tokenizer.control_tokens,
        dtype=token_dtype(tokenizer).name,
        left_out=dict(sorted(left_out.items())),
        splits={split: _sum(infos) for split, infos in shards.items()},
    )


def _sum(shards: list[ShardInfo]) -> SplitInfo:
    return SplitInfo(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )
