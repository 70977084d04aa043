"""Shared fixtures: a byte-level tokenizer without merges, and token stores of given documents."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from tests.support.stores import StoreWriter


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """258 tokens: `<bos>` 0, `<eos>` 1 and the 256 bytes."""
    return Tokenizer.train([], vocab_size=258)


def write_store(
    out: Path, tokenizer: Tokenizer, documents: Sequence[Sequence[int]], shard_tokens: int = 2**20
) -> TokenStore:
    """A store whose train split is `documents`, given as token ids."""
    with pytest.MonkeyPatch.context() as patch, StoreWriter(out, tokenizer, shard_tokens=shard_tokens) as writer:
        # Hundreds of stores that no crash has to survive; what flushing is for is tested in test_staging.
        patch.setattr(os, "fsync", lambda _: None)
        for document in documents:
            writer.add("train", document, len(document))
        writer.finish(recipe={"documents": len(documents)})
    return TokenStore.open(out)


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[..., TokenStore]:
    """`make_store(documents, shard_tokens=...)`: a new store of token ids in a folder of its own."""

    def make(documents: Sequence[Sequence[int]], shard_tokens: int = 2**20) -> TokenStore:
        return write_store(tmp_path_factory.mktemp("store") / "store", tokenizer, documents, shard_tokens)

    return make
