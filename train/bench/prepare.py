"""`sinkbed bench prepare`: documents to tokens on disk, against the ways others take, on the same files.

Each turn of each contender runs in a new process, so that no turn finds another's caches or memory; what
is imported and loaded before is not timed. All begin at the same JSONL files, in as many pieces as let every
contender use its processes, except the bare tokenizer, whose texts are in memory and whose tokens are thrown
away: the ceiling. Ours also shuffles, splits by hash, makes checksums and flushes to the disk.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.source.config import Source
from sinkbed.data.source.documents import Documents
from sinkbed.data.tokenizer import Tokenizer

_BLOCK = 1_024  # tokens a row, for the contenders that cut rows while they prepare
_PIECES_A_WORKER = 4


@dataclass(frozen=True)
class Job:
    """What a contender is given."""

    files: tuple[str, ...]
    """JSONL, the document under `text`."""
    tokenizer: str
    """A tokenizer.json."""
    bos: str
    eos: str
    workers: int
    """Processes or threads it may use."""
    folder: str
    """Where it writes; gone afterwards."""


class Turn(NamedTuple):
    """One turn of one contender."""

    seconds: float
    tokens: int
    peak_bytes: int
    """Of the largest of its processes, imports included; 0 where the system does not tell."""


Contender = Callable[[Job], Callable[[], Callable[[], int]]]
"""Imports and loads; what it returns is timed, and returns how to count the tokens, which is not."""


def texts_of(path: str | Path) -> Iterator[str]:
    """Documents of a JSONL file."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def bare_tokenizer(job: Job) -> Callable[[], Callable[[], int]]:
    """`tokenizers` alone: texts in memory to ids in memory."""
    texts = [text for path in job.files for text in texts_of(path)]
    backend = Tokenizer.load(job.tokenizer, bos=job.bos, eos=job.eos).backend

    def work() -> Callable[[], int]:
        total = 0
        for start in range(0, len(texts), 2_048):
            total += sum(map(len, backend.encode_batch_fast(texts[start : start + 2_048], add_special_tokens=False)))
        return lambda: total

    return work


def sinkbed(job: Job) -> Callable[[], Callable[[], int]]:
    """`sinkbed prepare`: a token store."""
    config = PrepareConfig(
        source=Source(kind="jsonl", files=job.files),
        tokenizer=TokenizerConfig(path=job.tokenizer, bos=job.bos, eos=job.eos),
        validation_share=0.0,  # texts are hashed all the same, and a small corpus might have none to hold out
        out=str(Path(job.folder) / "store"),
    )
    import datasets  # noqa: F401  imported on use: not part of the work

    def work() -> Callable[[], int]:
        manifest = prepare(config, progress=False, workers=job.workers)
        return lambda: sum(split.tokens for split in manifest.splits.values())

    return work


def datasets_map(job: Job) -> Callable[[], Callable[[], int]]:
    """`datasets.map` twice: tokenize, then concatenate and cut into blocks, as in Transformers' run_clm.py.

    The tokens after the last block of each batch are dropped, as there.
    """
    import datasets

    tokenizer = Tokenizer.load(job.tokenizer, bos=job.bos, eos=job.eos)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer.encode_batch(batch["text"])}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [index for ids in batch["input_ids"] for index in ids]
        whole = len(joined) // _BLOCK * _BLOCK
        return {"input_ids": [joined[start : start + _BLOCK] for start in range(0, whole, _BLOCK)]}

    def work() -> Callable[[], int]:
        split = partial(datasets.Dataset.map, batched=True, num_proc=job.workers)
        texts = datasets.load_dataset("json", data_files=list(job.files), split="train", num_proc=job.workers)
        tokens = split(texts, tokenize, remove_columns=texts.column_names)
        blocks = split(tokens, group)
        return lambda: len(blocks) * _BLOCK

    return work


def litdata_optimize(job: Job) -> Callable[[], Callable[[], int]]:
    """LitData's `optimize`, a file an input, tokens in chunks for its TokensLoader."""
    import litdata

    loader = litdata.TokensLoader(block_size=_BLOCK)
    out = Path(job.folder) / "chunks"

    def work() -> Callable[[], int]:
        litdata.optimize(
            fn=partial(_litdata_documents, job),
            inputs=list(job.files),
            output_dir=str(out),
            chunk_bytes="64MB",
            item_loader=loader,
            num_workers=job.workers,
            # The default, spawn, would add the start of an interpreter to each turn.
            start_method="fork",
            verbose=False,
        )
        return lambda: sum(chunk["dim"] for chunk in json.loads((out / "index.json").read_text())["chunks"])

    return work


def _litdata_documents(job: Job, path: str) -> Iterator[Any]:
    import torch

    tokenizer = Tokenizer.load(job.tokenizer, bos=job.bos, eos=job.eos)
    for text in texts_of(path):
        yield torch.tensor(tokenizer.encode(text), dtype=torch.int32)


CONTENDERS: dict[str, Contender] = {
    "tokenizers, in memory": bare_tokenizer,
    "Sinkbed": sinkbed,
    "datasets.map, blocks": datasets_map,
    "litdata optimize": litdata_optimize,
}
_LOSSLESS = ("tokenizers, in memory", "Sinkbed", "litdata optimize")


def _turn(name: str, job: Job) -> Turn:
    """Run in a process of its own."""
    work = CONTENDERS[name](job)
    began = time.perf_counter()
    count = work()
    seconds = time.perf_counter() - began
    return Turn(seconds, count(), _peak_bytes())


def _peak_bytes() -> int:
    """Peak of this process or of its largest child, whichever is more."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # ru_maxrss of a new process begins at the size of the one that started it; this one does not.
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1_024 * max(children, int(own[1])) if own else 0


def one_turn(name: str, job: Job) -> Turn:
    """One turn of a contender, in a new process that writes nothing outside a new folder."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        changes = {
            "RAYON_NUM_THREADS": str(job.workers),
            "TOKENIZERS_PARALLELISM": "false" if name in ("datasets.map, blocks", "litdata optimize") else "true",
            "HF_DATASETS_CACHE": f"{folder}/cache",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "DATA_OPTIMIZER_CACHE_FOLDER": f"{folder}/litdata",
            "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{folder}/litdata-inputs",
            "PYTHONWARNINGS": "ignore:resource_tracker",  # litdata leaves semaphores to the end of its process
        }
        before = {key: os.environ.get(key) for key in changes}
        os.environ.update(changes)  # read when the libraries are imported: the new process inherits them
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                return pool.submit(_turn, name, replace(job, folder=folder)).result()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def write_corpus(arguments: Any, folder: Path) -> tuple[tuple[str, ...], int]:
    """The corpus in pieces of JSONL; their paths, and the UTF-8 bytes of all texts."""
    if arguments.file and not arguments.file.is_file():
        raise FileNotFoundError(f"bench prepare: no file at {arguments.file}; give a JSONL file")
    paths = [folder / f"corpus-{i:03}.jsonl" for i in range(_PIECES_A_WORKER * arguments.workers)]
    size = 0
    files = [path.open("w", encoding="utf-8") for path in paths]
    try:
        for _ in range(arguments.copies):
            texts = texts_of(arguments.file) if arguments.file else Documents(Source(kind="demo"))
            for number, text in enumerate(texts):
                files[number % len(files)].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
    finally:
        for file in files:
            file.close()
    return tuple(str(path) for path in paths if path.stat().st_size), size


def _proportional(pid: int | str) -> int:
    """Bytes of a process and of all below it, pages that several share counted in parts."""
    try:
        below = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
        own = re.search(r"Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:  # it has just ended
        return 0
    return (1_024 * int(own[1]) if own else 0) + sum(map(_proportional, below))


def _summed_peak(begin: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and the peak of `_proportional`; 0 where the system does not tell."""
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], _proportional(os.getpid()))

    watch = threading.Thread(target=look)
    watch.start()
    began = time.perf_counter()
    try:
        begin()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watch.join()
    return seconds, peak[0]


def _prepare_lines(path: str, split: str, out: str, vocab_size: int, workers: int) -> tuple[float, int]:
    config = PrepareConfig(
        source=Source(kind="text", files=path, split=split, streaming=True),
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        validation_share=0.0,
        out=out,
    )
    return _summed_peak(lambda: prepare(config, progress=False, workers=workers))


def long_line(arguments: Any) -> int:
    """So many megabytes in one line, against the same bytes as 2,000-byte lines: rate, and memory of all processes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
        size = arguments.long_line * 1_000_000
        lines = [" ".join(rng.choices(words, k=320)) for _ in range(size // 2_080)]
        for name, separator in (("many lines", "\n"), ("one line", " ")):
            path = Path(folder) / f"{name}.txt"
            path.write_text(separator.join(lines))
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                job = str(path), "line", f"{folder}/{name}", arguments.vocab_size, arguments.workers
                seconds, peak = pool.submit(_prepare_lines, *job).result()
            size = path.stat().st_size
            print(f"{name:12}{size / 1e6:8.1f} MB{size / seconds / 1e6:9.2f} MB/s, start included{peak / 1e6:9,.0f} MB")
    return 0


def run(arguments: Any) -> int:
    """MB/s and tokens/s of each contender, in turns."""
    if arguments.long_line:
        return long_line(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
        files, size = write_corpus(arguments, Path(folder))
        path, bos, eos = arguments.tokenizer, arguments.bos, arguments.eos
        if path is None:
            path, bos, eos = Path(folder) / "tokenizer.json", "<bos>", "<eos>"
            texts = (text for file in files for text in texts_of(file))
            Tokenizer.train(texts, vocab_size=arguments.vocab_size).save(path)
        tokenizer = Tokenizer.load(path, bos=bos, eos=eos)
        job = Job(files, str(path), bos, eos, arguments.workers, folder)
        names = [name for name in CONTENDERS if name != "litdata optimize" or find_spec("litdata")]
        turns: dict[str, list[Turn]] = {name: [] for name in names}
        for _ in range(arguments.repeats):
            for name in names:  # in turn, so that whatever else the machine does falls on all of them alike
                turns[name].append(one_turn(name, job))
        _check_tokens(turns)
        _print(turns, size, tokenizer.vocab_size, arguments)
    return 0


def _check_tokens(turns: dict[str, list[Turn]]) -> None:
    expected = turns["tokenizers, in memory"][0].tokens
    for name, found in turns.items():
        for turn in found:
            if not 0 < turn.tokens <= expected or (name in _LOSSLESS and turn.tokens != expected):
                raise ValueError(f"bench prepare: {name}: expected {expected:,} tokens, got {turn.tokens:,}")


def _print(turns: dict[str, list[Turn]], size: int, vocab_size: int, arguments: Any) -> None:
    tokens = turns["tokenizers, in memory"][0].tokens
    medians = {name: statistics.median(turn.seconds for turn in found) for name, found in turns.items()}
    base = medians["tokenizers, in memory"]
    print(
        f"{size / 1e6:.1f} MB of text, {tokens:,} tokens, vocabulary {vocab_size:,}; {arguments.workers} threads or "
        f"processes, {arguments.repeats} turns each, medians"
    )
    print(f"{'':24}{'seconds':>9}{'MB/s':>9}{'tokens/s':>13}{'vs tokenizers':>15}{'peak of a process':>19}")
    for name, seconds in medians.items():
        peak = max(turn.peak_bytes for turn in turns[name])
        print(
            f"{name:24}{seconds:9.2f}{size / seconds / 1e6:9.2f}{tokens / seconds:13,.0f}{base / seconds:14.2f}×"
            f"{peak / 1e6:16,.0f} MB"
        )
    if "litdata optimize" not in turns:
        # Not in the bench extra: it requires torchvision, which may bring another torch.
        needed = "litdata boto3 botocore jmespath s3transfer obstore python-dateutil six"
        print(f"litdata: not installed, left out; pip install --no-deps {needed}")
