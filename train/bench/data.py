"""`sinkbed bench data`: the way from token store to batches.

loader    batches against what the model of a run config consumes
packing   tokens a second from documents to rows, and what each packing pads, cuts and crops
memory    what a training process holds, and how long opening and reading take, as the store grows
"""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinkbed.data.pack.audit import audit
from sinkbed.data.pack.batches import RowLoader, Rows, RowSampler
from sinkbed.data.pack.plan import PlanSettings, items_of
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.prepare.staging import StagingFolder, manifest_of, shard_name
from sinkbed.data.store.manifest import ShardInfo
from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from sinkbed.train.bench.timing import in_new_process, interleave, memory_of_process
from sinkbed.train.bench.training import decoder_config, decoder_step, random_batch, read_config
from sinkbed.train.loop.cpu import use_cpu

_SHARD_DOCUMENTS = 130_000  # some 64 million tokens, as shards of text have
_BATCHES = 100  # a turn: many more than a worker holds ready
PACKINGS: dict[str, dict[str, Any]] = {
    "concat": {},
    "best_fit": {"packing": "best_fit"},
    "best_fit, fill: crop": {"packing": "best_fit", "fill": "crop", "overflow": "truncate"},
    "best_fit, fill: repeat": {"packing": "best_fit", "fill": "repeat", "overflow": "truncate"},
    "grouped": {"packing": "grouped"},
    "pad": {"packing": "pad"},
}
# Title and width.
MEMORY_COLUMNS = {"store": 12, "documents": 12, "open": 12, "plan": 12, "audit": 12, "batch": 12, "again": 12}
MEMORY_COLUMNS |= {"private memory": 16, "page cache": 12}


def loader(rows: Rows, batch: int, workers: int) -> Callable[[], None]:
    """A turn of the loader that `sinkbed fit` trains from."""
    stream = iter(RowLoader(rows, RowSampler(batch), num_workers=workers))

    def turn() -> None:
        for _ in range(_BATCHES):
            next(stream)

    return turn


def run_loader(arguments: Any) -> None:
    """Tokens a second from the loader and through the model, in turns."""
    config = read_config(arguments.config)
    torch.manual_seed(0)
    data = config["data"]
    B, T = data["batch_size"], data["context_length"]
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


def run_packing(arguments: Any) -> None:
    """Tokens a second, on one core, of laying out documents and of making rows, and what each packing leaves out."""
    config = read_config(arguments.config)
    store = TokenStore.open(arguments.store or Path(config["data"]["store"]), "train")
    T, B = arguments.length, arguments.batch
    print(f"{store.path}: {store.tokens:,} tokens in {store.documents:,} documents; batches of {B} rows of {T}")
    titles = {"plan": 8, "rows": 8, "both": 8, "padded": 10, "cropped": 10, "repeated": 10, "cut": 8}
    print(f"{'million tokens/s':24}" + "".join(f"{title:>{width}}" for title, width in titles.items()))
    for name, axes in PACKINGS.items():
        apart: dict[str, Any] = {} if name == "pad" else {"mask": "intra_document", "positions": "document"}
        strategy = Strategy(**axes, **apart)
        rows = Rows(store, strategy, T)

        def make(rows: Rows = rows) -> None:
            for batch in range(_BATCHES):
                rows.__getitems__(range(batch * B, (batch + 1) * B))

        def plan(strategy: Strategy = strategy) -> None:
            recipe = PlanSettings(strategy=strategy, room=T, extras=1)
            recipe.packing.lay_out(items_of(store.offsets, 0, store.documents, recipe), recipe.room)

        contenders: dict[str, Callable[[], Any]] = {"rows": make}
        if axes:
            contenders["plan"] = plan
        seconds = {t.name: t.median for t in interleave(contenders, arguments.repeats, warmup=1)}
        of_rows = seconds["rows"] / (_BATCHES * B * T)
        of_plan = seconds.get("plan", 0.0) / store.tokens
        counts = audit(rows)
        figures = [f"{1e-6 / of_plan:8.0f}" if of_plan else f"{'-':>8}"]
        figures += [f"{1e-6 / of_rows:8.1f}", f"{1e-6 / (of_rows + of_plan):8.1f}"]
        for share in ("padding", "cropped", "repeated"):
            figures.append(f"{100 * counts[f'share_of_tokens_{share}']:8.3f} %")
        figures.append(f"{100 * counts['share_of_documents_cut']:6.1f} %")
        print(f"{name:24}" + "".join(figures))


def run_memory(arguments: Any) -> None:
    """Generate stores of growing size; open and read each in a process of its own."""
    print(f"random batches of {arguments.batch} rows of {arguments.length}; memory beyond that before opening")
    print(f"{'':10}" + "".join(f"{column:>{width}}" for column, width in MEMORY_COLUMNS.items()))
    with tempfile.TemporaryDirectory(prefix="sinkbed-bench-", dir=arguments.scratch) as folder:
        for megabytes in arguments.megabytes:
            path = Path(folder) / f"{megabytes}MB"
            generate(path, megabytes * 10**6 // 2)
            for packing in ("concat", "best_fit"):
                cells = f"{megabytes:,} MB", *in_new_process(read_store, path, packing, arguments)
                aligned = (f"{c:>{width}}" for c, width in zip(cells, MEMORY_COLUMNS.values(), strict=True))
                print(f"{packing:10}" + "".join(aligned), flush=True)
            shutil.rmtree(path)


def generate(path: Path, tokens: int) -> None:
    """A token store of random 16-bit tokens in documents of 500 on average, log-normal."""
    generator, tokenizer = np.random.default_rng(0), Tokenizer.train([], vocab_size=258)
    shards: list[ShardInfo] = []
    with StagingFolder(path) as staging:
        while tokens > 0:
            lengths = 1 + generator.lognormal(5.7, 1.0, _SHARD_DOCUMENTS).astype(np.int64)
            lengths = lengths[: np.searchsorted(np.cumsum(lengths), tokens) + 1]
            text = generator.integers(2, 258, size=int(lengths.sum()), dtype=np.uint16)
            shards.append(staging.write_shard(shard_name("train", len(shards)), text, lengths, lengths))
            tokens -= len(text)
        staging.write_tokenizer(tokenizer)
        staging.publish(manifest_of({"generated": True}, tokenizer, {"train": shards}, {}))


def read_store(path: Path, packing: Any, arguments: Any) -> list[str]:
    """Open a store as training does and read random batches from all of it; what that took, as in `MEMORY_COLUMNS`."""
    use_cpu(1)
    before = _memory()
    times = [time.perf_counter()]
    store = TokenStore.open(path)
    times.append(time.perf_counter())
    rows = Rows(store, Strategy(packing=packing), arguments.length)
    times.append(time.perf_counter())
    audit(rows)
    times.append(time.perf_counter())
    opened, planned, audited = (later - earlier for earlier, later in itertools.pairwise(times))

    def read(batch: int) -> float:
        began = time.perf_counter()
        rows.__getitems__(range(batch * arguments.batch, (batch + 1) * arguments.batch))
        return time.perf_counter() - began

    # Twice the same random rows: first from wherever they are, then from the page cache.
    first, again = (statistics.median(map(read, range(arguments.batches))) for _ in range(2))
    private, cached = (after - earlier for earlier, after in zip(before, _memory(), strict=True))
    return [
        f"{store.documents:,}",
        f"{opened:.3f} s",
        f"{planned:.2f} s",
        f"{audited:.2f} s",
        f"{1e3 * first:.2f} ms",
        f"{1e3 * again:.2f} ms",
        f"{private / 1e6:.0f} MB",
        f"{cached / 1e6:.0f} MB",
    ]


def _memory() -> tuple[int, int]:
    """Bytes of this process that are its own, and that are mapped files."""
    return memory_of_process("RssAnon"), memory_of_process("RssFile")


def run(arguments: Any) -> int:
    """The parts that were asked for."""
    use_cpu(arguments.threads)
    for part in arguments.parts:
        {"loader": run_loader, "packing": run_packing, "memory": run_memory}[part](arguments)
        print()
    return 0
