"""Batches come in one order whatever the processes and workers, and the state is the rows consumed."""

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbed.data.pack.batches import Batch, RowLoader, Rows, RowSampler
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore

MakeStore = Callable[..., TokenStore]


@pytest.fixture(scope="module")
def store(make_store: MakeStore) -> TokenStore:
    generator = np.random.default_rng(0)
    return make_store([generator.integers(2, 258, size=size).tolist() for size in generator.integers(0, 60, size=40)])


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_tensors_have_the_promised_shapes_and_types(store: TokenStore) -> None:
    batch = Rows(store, Strategy(), 16).__getitems__([3, 0, 5])
    assert {name: tensor.dtype for name, tensor in batch._asdict().items()} == {
        "tokens": torch.int64,
        "targets": torch.int64,
        "loss_mask": torch.bool,
        "positions": torch.int64,
        "doc_start": torch.int32,
        "doc_end": torch.int32,
    }
    assert all(tensor.shape == (3, 16) for tensor in batch)
    assert all(tensor.is_contiguous() for name, tensor in batch._asdict().items() if name != "positions")
    assert batch.positions.stride() == (0, 1), "one row of positions serves all"
    assert isinstance(batch.to("meta"), Batch) and batch.to("meta").tokens.device.type == "meta"


def test_row_numbers_beyond_an_epoch_belong_to_the_next_in_another_order(store: TokenStore) -> None:
    rows = Rows(store, Strategy(), 16, seed=4)
    count = len(rows)
    epochs = [rows.__getitems__(list(range(e * count, (e + 1) * count))).tokens for e in range(2)]
    assert not torch.equal(*epochs)
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())
    assert torch.equal(rows[count + 3].tokens[0], epochs[1][3])
    assert not torch.equal(Rows(store, Strategy(), 16, seed=5).__getitems__(list(range(count))).tokens, epochs[0])


def test_few_unique_rows_are_those_of_the_first_documents_in_an_order_of_each_epoch(store: TokenStore) -> None:
    every, few = Rows(store, Strategy(), 16, seed=4), Rows(store, Strategy(), 16, seed=4, unique_rows=7)
    assert len(every) > 7 == len(few)
    text = store.gather(np.array([0]), np.array([16 * 7])).tolist()
    epochs = [few.__getitems__(list(range(e * 7, (e + 1) * 7))).tokens.tolist() for e in range(3)]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 3, "each epoch in its own order"
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    found = {token for row in epochs[0] for token in row} - {store.manifest.eos_id}
    assert found <= set(text), "of the first documents"
    again = pickle.loads(pickle.dumps(few))
    assert len(again) == 7 and equal(again[9], few[9])
    with pytest.raises(ValueError, match=r"unique_rows: expected 1 to .*, got 0"):
        Rows(store, Strategy(), 16, unique_rows=0)
    with pytest.raises(ValueError, match="the rows of the split"):
        Rows(store, Strategy(), 16, unique_rows=len(every) + 1)


def test_batches_made_many_at_a_time_are_those_of_the_sampler(store: TokenStore) -> None:
    rows = Rows(store, Strategy(first_token="random"), 16)
    sampler = RowSampler(12, micro_batch_size=3, rows_consumed=24, world_size=2, rank=1)
    wanted = list(itertools.islice(sampler, 800))
    batches = list(itertools.islice(RowLoader(rows, sampler), 800))
    for numbers, batch in zip(wanted, batches, strict=True):
        assert equal(batch, rows.__getitems__(numbers)) and batch.tokens.is_contiguous()
    assert len({batch.tokens.untyped_storage().data_ptr() for batch in batches}) == 3 == -(-800 * 3 * 16 // 2**14)


@pytest.mark.slow
def test_workers_started_afresh_read_the_same_rows(store: TokenStore) -> None:
    rows = Rows(store, Strategy(first_token="random"), 16)
    steps = 3 * 2**14 // (3 * 16)  # of what is made at a time three, by two workers in turn

    def load(**options: Any) -> list[Batch]:
        return list(itertools.islice(RowLoader(rows, RowSampler(3), **options), steps))

    alone = load()
    assert len(alone) == steps
    for context in ("fork", "spawn"):
        parallel = load(num_workers=2, multiprocessing_context=context)
        assert all(equal(a, b) for a, b in zip(alone, parallel, strict=True))
        assert isinstance(parallel[0], Batch)


def test_what_a_worker_is_sent_does_not_grow_with_the_store(make_store: MakeStore) -> None:
    sizes = [len(pickle.dumps(Rows(make_store([[2, 3]] * count), Strategy(), 8))) for count in (50, 5000)]
    assert abs(sizes[0] - sizes[1]) < 20 and max(sizes) < 2000


@settings(max_examples=60, deadline=None)
@given(
    micro_batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    world_size=st.integers(1, 4),
    consumed_steps=st.integers(0, 5),
)
def test_all_processes_together_read_the_rows_in_order(
    micro_batch_size: int, accumulate: int, world_size: int, consumed_steps: int
) -> None:
    """Whatever the cut, global batch b is rows [b * G, (b + 1) * G), each once; resuming continues it."""
    total = micro_batch_size * accumulate * world_size
    samplers = [
        RowSampler(
            total,
            micro_batch_size=micro_batch_size,
            rows_consumed=consumed_steps * total,
            world_size=world_size,
            rank=rank,
        )
        for rank in range(world_size)
    ]
    assert samplers[0].accumulate == accumulate
    steps = 3
    per_rank = [list(itertools.islice(sampler, steps * accumulate)) for sampler in samplers]
    assert all(len(batch) == micro_batch_size for batches in per_rank for batch in batches)
    # Micro step by micro step, all ranks side by side.
    read = [row for micro in zip(*per_rank, strict=True) for batch in micro for row in batch]
    begin = consumed_steps * total
    assert read == list(range(begin, begin + steps * total))


def test_another_number_of_processes_continues_the_same_rows() -> None:
    one = itertools.islice(RowSampler(8), 3)
    expected = [sorted(batch) for batch in one]
    ranks = [RowSampler(8, micro_batch_size=2, rows_consumed=8, world_size=2, rank=rank) for rank in range(2)]
    assert ranks[0].accumulate == 2
    for step in (1, 2):
        rows = [row for sampler in ranks for batch in list(sampler_slice(sampler, step - 1)) for row in batch]
        assert sorted(rows) == expected[step]


def sampler_slice(sampler: RowSampler, step: int) -> list[list[int]]:
    return list(itertools.islice(sampler, step * sampler.accumulate, (step + 1) * sampler.accumulate))


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected a positive multiple of .* 4 \* 2 rows, got 12"):
        RowSampler(12, micro_batch_size=4, world_size=2)


def test_a_context_longer_than_the_split_is_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"context_length 4096 but the split 'train' has only [\d,]+ tokens in 40"):
        Rows(store, Strategy(), 4096)
    with pytest.raises(ValueError, match=r"context_length: expected .*, got 1"):
        Rows(store, Strategy(), 1)


def test_the_last_row_needs_a_token_beyond_it(make_store: MakeStore) -> None:
    strategy = Strategy(document_end="none")
    assert len(Rows(make_store([[2] * 17]), strategy, 8)) == 2
    assert len(Rows(make_store([[2] * 16]), strategy, 8)) == 1


def test_a_strategy_that_does_not_fit_the_store_is_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"first_token: expected an id less than 258 .* got 258"):
        Rows(store, Strategy(first_token=258), 16)
    with pytest.raises(ValueError, match="window: expected at most 15 with context_length 16, got 16"):
        Rows(store, Strategy(window=16), 16)
    for seed in (-1, 2**63, True, 1.5):
        with pytest.raises(ValueError, match="seed: expected an integer"):
            Rows(store, Strategy(), 16, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="row -1"):
        Rows(store, Strategy(), 16)[-1]
