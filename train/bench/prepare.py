"""`sinkbed bench prepare`: documents to tokens on disk, against `datasets.map`, on the same files.

Each turn of each contender runs in a new process; what is imported and loaded before is not timed. All begin at the
same JSONL files, in as many pieces as let every contender use its processes, except the bare tokenizer, whose texts are
in memory and whose tokens are thrown away: the ceiling. Ours also shuffles, splits by hash, makes checksums and flushes
to the disk.
"""

import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.source.config import Source
from sinkbed.data.source.documents import Documents
from sinkbed.data.tokenizer import Tokenizer
from sinkbed.train.bench.timing import in_new_process, memory_of_tree, peak_bytes, take_turns

_BLOCK = 1_024  # tokens a row, for the contender that cuts rows while it prepares
_PIECES_A_WORKER = 4
_BARE, _OURS, _PEER = "tokenizers, in memory", "Sinkbed", "datasets.map, blocks"


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


CONTENDERS: dict[str, Contender] = {_BARE: bare_tokenizer, _OURS: sinkbed, _PEER: datasets_map}


def _turn(name: str, job: Job) -> Turn:
    """A contender's turn, in a process that writes nothing outside a new folder."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        os.environ |= {  # this process is a new one: the libraries read them when they are first used
            "RAYON_NUM_THREADS": str(job.workers),
            "TOKENIZERS_PARALLELISM": str(name != _PEER).lower(),
            "HF_DATASETS_CACHE": f"{folder}/cache",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        work = CONTENDERS[name](replace(job, folder=folder))
        began = time.perf_counter()
        count = work()
        seconds = time.perf_counter() - began
        return Turn(seconds, count(), peak_bytes())


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


def _prepare_lines(path: Path, arguments: Any) -> tuple[float, int]:
    """Seconds, and the most memory that this process and those it starts have together."""
    os.environ["HF_DATASETS_CACHE"] = str(path.with_suffix(".cache"))  # of a new process, as above
    config = PrepareConfig(
        source=Source(kind="text", files=str(path), split="line"),
        tokenizer=TokenizerConfig(vocab_size=arguments.vocab_size),
        validation_share=0.0,
        out=str(path.with_suffix(".store")),
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, memory_of_tree(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        prepare(config, progress=False, workers=arguments.workers)
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    return seconds, peak


def long_line(arguments: Any) -> None:
    """So many megabytes in one line, against the same bytes as 2,000-byte lines: rate, and memory of all processes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    lines = [" ".join(rng.choices(words, k=320)) for _ in range(arguments.long_line * 1_000_000 // 2_080)]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
        for name, separator in (("many lines", "\n"), ("one line", " ")):
            path = Path(folder) / f"{name}.txt"
            path.write_text(separator.join(lines))
            seconds, peak = in_new_process(_prepare_lines, path, arguments)
            size = path.stat().st_size
            print(f"{name:12}{size / 1e6:8.1f} MB{size / seconds / 1e6:9.2f} MB/s, start included{peak / 1e6:9,.0f} MB")


def run(arguments: Any) -> int:
    """MB/s and tokens/s of each contender, in turns."""
    if arguments.long_line:
        long_line(arguments)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
        files, size = write_corpus(arguments, Path(folder))
        path, bos, eos = arguments.tokenizer, arguments.bos, arguments.eos
        if path is None:
            path, bos, eos = Path(folder) / "tokenizer.json", "<bos>", "<eos>"
            texts = (text for file in files for text in texts_of(file))
            Tokenizer.train(texts, vocab_size=arguments.vocab_size).save(path)
        tokenizer = Tokenizer.load(path, bos=bos, eos=eos)
        job = Job(files, str(path), bos, eos, arguments.workers, folder)
        contenders = {name: partial(in_new_process, _turn, name, job) for name in CONTENDERS}
        turns = take_turns(contenders, arguments.repeats)
        _check_tokens(turns)
        _print(turns, size, tokenizer.vocab_size, arguments)
    return 0


def _check_tokens(turns: dict[str, list[Turn]]) -> None:
    expected = turns[_BARE][0].tokens
    for name, of_name in turns.items():
        for turn in of_name:
            if not 0 < turn.tokens <= expected or (name != _PEER and turn.tokens != expected):
                raise ValueError(f"bench prepare: {name}: expected {expected:,} tokens, got {turn.tokens:,}")


def _print(turns: dict[str, list[Turn]], size: int, vocab_size: int, arguments: Any) -> None:
    tokens = turns[_BARE][0].tokens
    medians = {name: statistics.median(turn.seconds for turn in of_name) for name, of_name in turns.items()}
    base = medians[_BARE]
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
