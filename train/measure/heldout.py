"""The probe set: the first documents of the validation split that are long enough, each in a row of its own, the same
for every strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from sinkbed.progress import documents_read
from sinkbed.train.measure.config import MeasureConfig

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sinkbed.data.store.token_store import TokenStore


def held_out(store: TokenStore, context_length: int, config: MeasureConfig) -> Iterator[NDArray[Any]]:
    """The first documents of a split with at least `sink_tokens` tokens, as many as are measured, cropped to a row."""
    rows = (store.slice(index, 0, context_length - 1) for index in range(store.documents))
    return islice((tokens for tokens in rows if len(tokens) >= config.sink_tokens), config.documents)


def delimiters_of(documents: Iterable[torch.Tensor], decode: Callable[[list[int]], str]) -> frozenset[int]:
    """Token ids of these documents whose text has neither letters nor digits: punctuation and white space."""
    texts = {index: decode([index]) for index in {int(i) for document in documents for i in document.unique()}}
    parts = "\N{REPLACEMENT CHARACTER}"  # what a part of a letter decodes to
    return frozenset(i for i, text in texts.items() if text and not any(c.isalnum() or c in parts for c in text))


@dataclass(frozen=True, eq=False)
class Probe:
    """Held-out documents, cropped to fit a row with room for BOS.

    Raises ValueError when the validation split has no document that is long enough.
    """

    documents: tuple[torch.Tensor, ...]
    """Token ids [n] of each document, without special tokens, sink_tokens <= n <= context_length − 1."""
    token_bytes: torch.Tensor
    """[V] UTF-8 bytes that each token id stands for."""
    bos_id: int
    eos_id: int
    special_ids: frozenset[int] = field(default_factory=frozenset)
    delimiters: frozenset[int] = field(default_factory=frozenset)
    """Token ids of punctuation and white space."""

    @classmethod
    def from_store(cls, store: TokenStore, context_length: int, config: MeasureConfig) -> Probe:
        """The first documents of `store` (the validation split) with at least `sink_tokens` tokens."""
        import torch

        config.check_context(context_length)
        documents = [torch.from_numpy(tokens.astype("int64")) for tokens in held_out(store, context_length, config)]
        if not documents:
            raise ValueError(
                f"measure.sink_tokens={config.sink_tokens}: the validation split has "
                f"{store.documents} documents, none that long; lower it or raise validation_share"
            )
        tokenizer = store.tokenizer()
        return cls(
            tuple(documents),
            torch.as_tensor(tokenizer.token_bytes, dtype=torch.int64),
            store.manifest.bos_id,
            store.manifest.eos_id,
            frozenset(store.manifest.special_ids),
            delimiters_of(documents, tokenizer.decode),
        )

    @cached_property
    def ordinary_ids(self) -> list[int]:
        """Every token id but special ones, in ascending order."""
        return [token for token in range(len(self.token_bytes)) if token not in self.special_ids]

    def head(self, count: int) -> Probe:
        """The first `count` documents."""
        return replace(self, documents=self.documents[:count])

    def batches(self, batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Numbers of documents, token ids [B, n] padded on the right, lengths [B]; like lengths together."""
        import torch

        order = sorted(range(len(self.documents)), key=lambda i: len(self.documents[i]))
        while order:
            longest = len(self.documents[order[-1]]) + 1
            size = max(1, min(len(order), batch_tokens // longest))
            chosen, order = order[-size:], order[:-size]
            rows = [self.documents[i] for i in chosen]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.eos_id)
            yield chosen, padded, torch.tensor([len(row) for row in rows])
            documents_read(len(chosen))
