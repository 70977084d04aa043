"""`sinkbed bench data`: batches of the training data path against what the model of a run config consumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.batches import Batch, Rows, RowSampler
from data.store import TokenStore
from data.strategy import Strategy
from train.bench import interleave
from train.bench_training import decoder_config, decoder_step, random_batch, read_config

_BATCHES = 100  # a turn: many more than a worker holds ready


def loader(rows: Rows, batch: int, workers: int) -> Callable[[], None]:
    """A turn of the loader that `sinkbed fit` trains from."""
    batches: DataLoader[Batch] = DataLoader(
        rows, batch_sampler=RowSampler(micro_batch=batch), collate_fn=Rows.collate, num_workers=workers
    )
    stream = iter(batches)

    def turn() -> None:
        for _ in range(_BATCHES):
            next(stream)

    return turn


def run(arguments: Any) -> int:
    """Tokens a second from the loader and through the model, in turns."""
    config = read_config(arguments.config)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    data = config["data"]
    B, T = data["global_batch"], data["context_length"]
    store = TokenStore.open(arguments.store or Path(data["store"]), "train")
    rows = Rows(store, Strategy(**data["strategy"]), T)
    vocab_size = store.manifest.vocab_size
    shape = decoder_config(config)
    model = "model, one training step"
    contenders = {model: decoder_step(shape, random_batch(B, T, vocab_size), vocab_size)}
    tokens = {model: B * T}
    for workers in (0, *range(1, arguments.workers + 1)):
        name = f"loader, {workers or 'no'} workers"
        contenders[name], tokens[name] = loader(rows, B, workers), _BATCHES * B * T
    timings = interleave(contenders, arguments.repeats, warmup=2)
    consumed = tokens[model] / timings[0].median
    print(f"{store.path}: {store.tokens:,} tokens; batches of {B} rows of {T}, {arguments.repeats} turns each")
    print(f"{'':28}{'tokens/s':>14}{'of what the model consumes':>28}")
    for t in timings:
        rate = tokens[t.name] / t.median
        print(f"{t.name:28}{rate:14,.0f}{rate / consumed:26.1f} ×")
    return 0
