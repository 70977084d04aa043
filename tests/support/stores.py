"""Token stores of documents that a test has at hand, given as token ids."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from sinkbed.data.prepare.staging import StagingFolder, manifest_of, shard_name
from sinkbed.data.store.manifest import Manifest, ShardInfo, token_type
from sinkbed.data.store.offsets import Offsets
from sinkbed.data.tokenizer import Tokenizer


class StoreWriter:
    """Builds a token store, document by document; nothing is visible at `out` until `finish`.

        with StoreWriter(out, tokenizer) as writer:
            writer.add("train", ids, len(text.encode()))
            manifest = writer.finish(recipe=recipe)

    Leaving without `finish` removes all that was written.
    """

    def __init__(
        self, out: Path | str, tokenizer: Tokenizer, *, shard_tokens: int = 2**26, replace: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._staging = StagingFolder(out, replace=replace)
        self._open: dict[str, list[tuple[Sequence[int], int]]] = defaultdict(list)
        self._shards: dict[str, list[ShardInfo]] = defaultdict(list)
        self._finished = False

    def __enter__(self) -> Self:
        self._staging.__enter__()
        self._staging.clear()
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._finished:
            self._staging.discard()
        self._staging.__exit__(*error)

    def add(self, split: str, tokens: Sequence[int], byte_count: int) -> None:
        documents = self._open[split]
        if documents and sum(len(ids) for ids, _ in documents) + len(tokens) > self._shard_tokens:
            self._close_shard(split)
        documents.append((tokens, byte_count))

    def finish(self, *, recipe: dict[str, Any]) -> Manifest:
        for split, documents in self._open.items():
            if documents:
                self._close_shard(split)
        self._staging.write_tokenizer(self._tokenizer)
        manifest = self._staging.publish(manifest_of(recipe, self._tokenizer, self._shards, {}))
        self._finished = True
        return manifest

    def _close_shard(self, split: str) -> None:
        ids, sizes = zip(*self._open[split], strict=True)
        self._open[split].clear()
        tokens = np.concatenate(
            [np.asarray(document, dtype=token_type(self._tokenizer.vocab_size)) for document in ids]
        )
        counts, sizes = (np.array(column, dtype=np.int64) for column in (list(map(len, ids)), sizes))
        name = shard_name(split, len(self._shards[split]))
        self._shards[split].append(self._staging.write_shard(name, tokens, counts, sizes))


def split_of(text: str, validation_share: float) -> str:
    """`train` or `validation`: a function of the text alone, its blake2b of 64 bits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_share * 2**64 else "train"


def offsets_of(lengths: Sequence[int]) -> Offsets:
    """Offsets of documents of these lengths, in one shard."""
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Offsets([len(lengths)], [sum(lengths)], lambda _: before)
