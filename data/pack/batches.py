"""Batches: rows of an epoch as tensors, in an order whose whole state is one integer.

Rows are numbered globally: number g is epoch g // R (R rows per epoch), and within the epoch the row that
the permutation of (seed, epoch) puts there. A global batch of G rows is rows [b * G, (b + 1) * G), however
many processes share it; so a run resumed from `rows_consumed` sees what the uninterrupted run would have
seen, on any number of processes.

    rows = Rows(TokenStore.open("stores/demo"), Strategy(first_token="bos"), context_length=512, seed=0)
    sampler = RowSampler(16, micro_batch_size=8, rows_consumed=0)
    loader = RowLoader(rows, sampler, num_workers=2)
"""

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from sinkbed.data.order import permute
from sinkbed.data.pack.assemble import Row, has_first_token, pack, random_tokens
from sinkbed.data.pack.layout import Layout, Planned, Stream
from sinkbed.data.pack.methods import PACKINGS
from sinkbed.data.pack.plan import Plan, PlanSettings
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from sinkbed.plain_text import counted
from sinkbed.ranges import check_number

_BLOCK = 1024
_AHEAD = 2**14  # tokens that are packed at a time, at least a batch


class Batch(NamedTuple):
    """B rows of T tokens; every tensor is [B, T]."""

    tokens: Tensor
    """int64, the input."""
    targets: Tensor
    """int64, the token that follows each."""
    loss_mask: Tensor
    """bool, whether the target counts."""
    positions: Tensor
    """int64, position index in the row or in the document, as the strategy says."""
    doc_start: Tensor
    """int32, row position where the document of each position starts, 0 if it started in an earlier row."""
    doc_end: Tensor
    """int32, row position after the document's last in this row."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to an accelerator can overlap with work."""
        return Batch(*(tensor.pin_memory() for tensor in self))

    def cut(self, rows: int) -> "list[Batch]":
        """Batches of so many rows each, in order: views."""
        return [Batch(*parts) for parts in zip(*(tensor.split(rows) for tensor in self), strict=True)]


class SplitTooShort(ValueError):
    """A split that does not fill one row."""


class Rows(Dataset[Batch]):
    """All rows of a split under a strategy, endlessly: a map from global row numbers to batches.

    Args:
        seed: decides the order of rows and the random first tokens; 0 or more.
        unique_rows: an epoch has only so many of the split's rows, those of the first documents. None: all.

    `len` is R, the rows of one epoch; numbers beyond it belong to later epochs. Picklable.
    Raises ValueError for a context longer than the split, and a strategy that does not fit the
    context or the vocabulary.
    """

    def __init__(
        self,
        store: TokenStore,
        strategy: Strategy,
        context_length: int,
        seed: int = 0,
        unique_rows: int | None = None,
    ) -> None:
        strategy.check_context(context_length)
        check_number("seed", seed, least=0, below=2**63, integer=True)
        manifest = store.manifest
        strategy.check_vocabulary(manifest.vocab_size, manifest.special_ids, store.path)
        self.store = store
        self.strategy = strategy
        self.context_length = context_length
        self.seed = seed
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self.layout = self._make_layout()
        if not self.layout.rows:
            raise SplitTooShort(
                f"context_length {context_length} but the split {store.split!r} has only {store.tokens:,} tokens "
                f"in {counted(store.documents, 'document')}, not one complete row; shorten the context or prepare a "
                "larger token store"
            )
        if unique_rows is not None and not 1 <= unique_rows <= self.layout.rows:
            raise ValueError(
                f"unique_rows: expected 1 to {self.layout.rows:,}, the rows of the split {store.split!r}, got "
                f"{unique_rows}; null for all of them"
            )
        self.unique_rows = unique_rows

    def __len__(self) -> int:
        return self.unique_rows or self.layout.rows

    def __getitem__(self, number: int) -> Batch:
        """Row of a global number, as a batch of one."""
        return self.__getitems__([number])

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Rows of some global numbers, in that order. Raises IndexError for a negative number."""
        number = np.asarray(numbers, dtype=np.int64)
        if number.size and number.min() < 0:
            raise IndexError(f"row {number.min()}: rows are numbered from 0")
        epoch = number // len(self)
        slot = self._slots(number)
        with_first = self.with_first(slot, epoch)
        if with_first.all():
            row = self._pack(slot, epoch, with_first=True)
        elif not with_first.any():
            row = self._pack(slot, epoch, with_first=False)
        else:
            parts = [
                self._pack(slot[some], epoch[some], with_first=kind)
                for kind, some in ((True, with_first), (False, ~with_first))
            ]
            back = np.argsort(np.argsort(~with_first, kind="stable"), kind="stable")
            row = Row(*(np.concatenate(columns)[back] for columns in zip(*parts, strict=True)))
        tokens, targets, loss_mask, doc_start, doc_end = map(torch.from_numpy, row)
        index = torch.arange(self.context_length)
        positions = index - doc_start if self.strategy.positions == "document" else index.expand(tokens.shape)
        return Batch(tokens, targets, loss_mask, positions, doc_start, doc_end)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.store, self.strategy, self.context_length, self.seed, self.unique_rows)

    def _slots(self, number: np.ndarray) -> np.ndarray:
        """[N] the row in its epoch of each global number.

        Training asks for one number after the other, and `permute` costs as much for one as for a thousand: a block of
        them is computed at a time, and the last one kept.
        """
        slots = np.empty_like(number)
        blocks = number // _BLOCK
        for block in np.unique(blocks):
            if self._block[0] != block:
                epoch, place = np.divmod(np.arange(block * _BLOCK, (block + 1) * _BLOCK), len(self))
                self._block = (int(block), permute(place, len(self), seed=self.seed, epoch=epoch))
            inside = blocks == block
            slots[inside] = self._block[1][number[inside] - block * _BLOCK]
        return slots

    def with_first(self, slot: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """[N] whether each row of an epoch [N] has its first token."""
        strategy = self.strategy
        if strategy.first_token_share == 1:
            return np.full(len(slot), bool(strategy.placed))
        return has_first_token(slot, share=strategy.first_token_share, seed=self.seed, epoch=epoch)

    def _pack(self, slot: np.ndarray, epoch: np.ndarray, *, with_first: bool) -> Row:
        manifest, first_tokens = self.store.manifest, self.strategy.first_tokens
        placed = np.empty((len(slot), len(self.strategy.placed)), dtype=np.int64) if with_first else None
        if placed is not None:
            for column, position in enumerate(self.strategy.placed):
                what = first_tokens[position]
                if what == "random":
                    placed[:, column] = random_tokens(
                        slot,
                        seed=self.seed,
                        epoch=epoch,
                        vocab_size=manifest.vocab_size,
                        special_ids=manifest.special_ids,
                        position=position,
                    )
                else:
                    placed[:, column] = manifest.token_id(what)  # type: ignore[assignment]  # none is not placed
        return pack(self.layout, slot, self.store.gather, placed_ids=placed, padding_id=manifest.eos_id)

    def _make_layout(self) -> Layout:
        store, strategy = self.store, self.strategy
        start, end = (store.manifest.token_id(what) for what in (strategy.document_start, strategy.document_end))
        common: dict[str, Any] = {
            "offsets": store.offsets,
            "context_length": self.context_length,
            "strategy": strategy,
            "start_id": start,
            "end_id": end,
        }
        if PACKINGS[strategy.packing].is_stream:
            return Stream(**common)
        room = self.context_length - len(strategy.placed)
        settings = PlanSettings(strategy=strategy, room=room, extras=(start is not None) + (end is not None))
        return Planned(
            plan=Plan.load(settings, store.offsets, store.path / "packing" / store.split, store.digest), **common
        )


class RowSampler(Sampler[list[int]]):
    """Batch sampler: the global row numbers of each micro batch of one process, from `rows_consumed` on, endlessly.

    A global batch of G rows is cut into contiguous micro batches, dealt to the processes in turn: step by step, all
    processes together walk the rows in order.

    Args:
        batch_size: G, the rows of one optimiser step, over all processes.
        micro_batch_size: rows a process handles at a time. None: its share of G.
        rows_consumed: rows that training has consumed, over all processes: the whole state.

    Raises ValueError where the micro batches of all processes do not divide G.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        micro_batch_size: int | None = None,
        rows_consumed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.micro_batch_size = batch_size // world_size if micro_batch_size is None else micro_batch_size
        self.rows_consumed = rows_consumed
        self.world_size = world_size
        self.rank = rank
        per_pass = self.micro_batch_size * world_size
        if per_pass < 1 or batch_size < 1 or batch_size % per_pass:
            raise ValueError(
                "data.batch_size: expected a positive multiple of micro_batch_size * world_size = "
                f"{self.micro_batch_size} * {world_size} rows, got {batch_size}"
            )
        self.accumulate = batch_size // per_pass
        """Micro batches of a process in a step."""

    def __iter__(self) -> Iterator[list[int]]:
        for begin in count(self.rows_consumed, self.batch_size):
            for step in range(self.accumulate):
                first = begin + (step * self.world_size + self.rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))


class _Joined(Sampler[list[int]]):
    """The lists of a sampler, so many at a time as one."""

    def __init__(self, sampler: RowSampler, lists: int) -> None:
        self.sampler = sampler
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        each = iter(self.sampler)
        while True:
            yield list(chain.from_iterable(islice(each, self.lists)))


class RowLoader(DataLoader[Batch]):
    """The micro batches of a sampler, endlessly. Small ones are packed many at a time, in a fraction of the time.

    Args:
        options: of DataLoader, such as `num_workers`.
    """

    def __init__(self, rows: Rows, sampler: RowSampler, **options: Any) -> None:
        self.micro_batch_size = sampler.micro_batch_size
        joined = _Joined(sampler, max(1, _AHEAD // (self.micro_batch_size * rows.context_length)))
        super().__init__(rows, batch_sampler=joined, collate_fn=default_convert, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return chain.from_iterable(batch.cut(self.micro_batch_size) for batch in super().__iter__())
