"""What preparing a config would give and take, from a bounded sample; nothing is written.

Local JSONL and text are sampled at the beginning of several files spread over the corpus, and the rest is
inferred from how far into the files the sample went (of compressed ones, in compressed bytes). Of Parquet
and the demo corpus the number of records is known, of a hub data set where its card tells. A mixture, and a
hub data set that tells nothing, can be sampled but not added up.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.prepare import available_cores, make_tokenizer
from data.recipe import PrepareConfig, recipe_of, selection
from data.selection import batches
from data.sources import Documents, SingleSource, Source, matching

S = TypeVar("S", bound=SingleSource)

SAMPLE_BYTES = 8_000_000
_SAMPLE_FILES = 8
_SAMPLE_TEXT_FILES = 256
_READ_AHEAD = 2**19  # a decompressor reads up to 128 KiB more than it gives: too much of a small file to infer from
_DOCUMENT_BYTES = 16  # an offset and a length in the token store


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Sizes of the token store to be, and how long it takes. None: cannot be told from a sample."""

    documents: int | None
    known: bool
    """Whether `documents` is the source's own count of its records rather than inferred from the sample."""
    bytes: int | None
    """UTF-8 bytes of the documents' text."""
    bytes_per_token: float
    tokens: int | None
    disk: int | None
    """Bytes of the token store."""
    seconds: float | None
    """Time left to encode, at `rate`, without the training of a tokenizer."""
    rate: float
    """Bytes of text a second: one process's times the workers that have a core, at most what is read a second."""
    finished_bytes: int
    """Bytes of text in shards that a stopped run has finished."""
    sample_documents: int
    sample_bytes: int
    trained_on_sample: bool
    """Whether the tokenizer was trained on the sample, the real one being trained on more."""
    left_out: dict[str, int]
    """Records of the sample that give no document, by reason."""


def estimate(config: PrepareConfig, *, workers: int | None = None, sample_bytes: int = SAMPLE_BYTES) -> Estimate:
    """Read up to `sample_bytes` of text, encode it with `workers` processes, and add up. Raises as `prepare`."""
    from data.encoding import Encoder, token_dtype

    began = time.perf_counter()
    sample = _Sample(config, sample_bytes)
    sample.seconds = time.perf_counter() - began
    with_texts = _Fixed(config.source, sample.texts)
    chosen = selection(config, with_texts)
    documents = list(chosen)
    if not documents:
        raise ValueError(f"the sample holds no document (left out: {dict(sample.left_out + chosen.left_out)})")
    size = sum(document.size for document in documents)
    tokenizer = make_tokenizer(config, with_texts, progress=False)
    # One process is timed, as many as there are cores for are assumed to do as much each, and none can be faster than
    # the one that reads: timing all of them on a sample would time how they start and stop.
    tokens, start = 0, time.perf_counter()
    with Encoder(tokenizer, 1) as encoder:
        for _, encoded in encoder.map(batches(documents, 2**62)):
            assert encoded is not None
            tokens += len(encoded.tokens)
    rate = size / (time.perf_counter() - start) * min(workers or available_cores(), available_cores())
    if sample.seconds:
        rate = min(rate, size / sample.seconds)
    finished = _finished_bytes(config)
    total = documents_total = None
    if sample.share is not None:
        total = max(size, round(size / sample.share))
        documents_total = max(len(documents), round(len(documents) / sample.share))
    return Estimate(
        documents=documents_total,
        known=sample.share == 1 or (sample.exact and not sample.left_out and not chosen.left_out),
        bytes=total,
        bytes_per_token=size / max(1, tokens),
        tokens=None if total is None else round(total * tokens / size),
        disk=None
        if total is None or documents_total is None
        else round(total * tokens / size * token_dtype(tokenizer).itemsize + documents_total * _DOCUMENT_BYTES),
        seconds=None if total is None else max(0, total - finished) / rate,
        rate=rate,
        finished_bytes=finished,
        sample_documents=len(documents),
        sample_bytes=size,
        trained_on_sample=config.tokenizer.path is None and sample.share != 1,
        left_out=dict(sorted((sample.left_out + chosen.left_out).items())),
    )


class _Sample:
    """Texts, what was left out while reading them, and which share of the corpus they are."""

    def __init__(self, config: PrepareConfig, budget: int) -> None:
        self.texts: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.share: float | None = None
        self.seconds = 0.0
        """What reading it took."""
        self.exact = False
        """Whether the number of records is known."""
        self._config = config
        if config.source.kind in ("jsonl", "text"):
            self._read_files(config.source, budget)
        else:
            self._read_head(config.source, budget)

    def _read_files(self, source: Source, budget: int) -> None:
        files = matching(source.patterns)
        limit = min(len(files), _SAMPLE_TEXT_FILES if source.kind == "text" else _SAMPLE_FILES)
        spread = [files[len(files) * i // limit] for i in range(limit)]
        sizes = {file: Path(file).stat().st_size for file in files}
        consumed = opened = read = 0
        for file in dict.fromkeys((*spread, *files)):
            if read >= budget:
                break
            opened += 1
            consumed_here, read_here = self._read_file(source, file, min(budget / limit, budget - read))
            consumed += consumed_here
            read += read_here
        self.exact = source.kind == "text"
        if self.exact:
            self.share = opened / len(files)
        elif consumed:
            self.share = min(1.0, consumed / sum(sizes.values()))

    def _read_file(self, source: Source, file: str, budget: float) -> tuple[int, int]:
        """Read records until `budget` characters; returns how far into the file, and how many."""
        from data.records import COMPRESSED, read_records

        read = 0
        ahead = _READ_AHEAD if file.endswith(COMPRESSED) else 0
        with open(file, "rb") as raw:
            for record in read_records(file, file, source.kind, source.column or "text", raw=raw):
                if record.problem and self._config.on_error == "refuse":
                    raise ValueError(f"{record.at}; or leave such records out with --on_error skip")
                if record.problem or not record.text or record.text.isspace():
                    self.left_out[record.problem or "empty"] += 1
                    continue
                self.texts.append(record.text)
                read += len(record.text)
                if read >= budget and source.kind != "text" and raw.tell() >= ahead:
                    return raw.tell(), read
        return Path(file).stat().st_size, read

    def _read_head(self, source: Source, budget: int) -> None:
        from data.loading import known_records

        documents = Documents(_streamed(source), on_error=self._config.on_error)
        read = 0
        ended = True
        for text in documents:
            self.texts.append(text)
            read += len(text)
            if read >= budget:
                ended = False
                break
        self.left_out = documents.left_out
        records = known_records(source)
        seen = len(self.texts) + self.left_out.total()
        if ended:
            self.share = 1.0
        elif records:
            self.share = min(1.0, seen / records)
            self.exact = True


class _Fixed(Documents):
    """Texts that were read before."""

    def __init__(self, source: Source, texts: list[str]) -> None:
        super().__init__(source)
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self._texts)


def _streamed(source: Source) -> Source:
    """The same source in its own order, read without a copy."""
    if source.kind == "mixture":
        return dataclasses.replace(source, sources=tuple(_single(part) for part in source.sources))
    return _single(source)


def _single(source: S) -> S:
    if source.kind == "demo":  # in memory anyway, and its long documents stand at its end
        return source
    return dataclasses.replace(source, streaming=True, shuffle_seed=None, shuffle_buffer=None)


def _finished_bytes(config: PrepareConfig) -> int:
    """Bytes of text that a stopped run of this config has encoded."""
    from data.units import UNITS_NAME, begun_recipe

    out = Path(config.out)
    folder = out.parent / f".{out.name}.partial"
    if begun_recipe(folder) != recipe_of(config):
        return 0
    units = (json.loads(path.read_text(encoding="utf-8")) for path in (folder / UNITS_NAME).glob("*.json"))
    return sum(shard["bytes"] for unit in units for shard in unit["shards"].values())
