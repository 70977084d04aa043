"""Samples of a source, spread over it, from which sizes of the whole are inferred.

A local source is a long row of bytes, file after file. Places at equal distances in it are sampled, a stretch
of records from each: so a file counts by its size, and a stretch tells what a byte there comes to, in bytes of
text, documents or tokens. Their mean, times all bytes, is the estimate, and their spread its error. In text
files and JSONL a stretch begins anywhere, in compressed files and Parquet with the file or the row group.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from sinkbed.data.prepare.recipe import PrepareConfig
from sinkbed.data.source.documents import Documents, Separator, SingleSource, Source, matching
from sinkbed.data.source.records import COMPRESSED, Record, read_records

S = TypeVar("S", bound=SingleSource)

_STRETCHES = 256
_COMPRESSED_STRETCHES = 16
_COMPRESSED_BYTES = 2**19  # of a compressed file: what its decompressor keeps back at the end is little beside them


@dataclass
class Stretch:
    """Some records of a source, one after the other."""

    size: float
    """How much of the source they take, in the unit of `Part.size`."""
    texts: list[str]
    places: int = 1
    """How many of the sampled places fall into it."""


@dataclass
class Part:
    """A source by itself, or one of several, and what was read of it."""

    stretches: list[Stretch]
    size: float | None
    """Of the whole, in bytes or records; None where it cannot be told."""
    whole: bool
    """Whether all of it was read."""
    records: int | None = None
    """How many records it has, where that is known."""

    def total(self, amounts: ArrayLike) -> tuple[float, float]:
        """What the whole holds, and the variance of that, when each stretch holds so much."""
        amounts = np.asarray(amounts, dtype=float)
        if self.whole:
            return float(amounts.sum()), 0.0
        assert self.size is not None
        rates = (amounts / [s.size for s in self.stretches]).repeat([s.places for s in self.stretches])
        spread = float(rates.var(ddof=1)) / len(rates) if len(rates) > 1 else float("nan")
        return float(rates.mean()) * self.size, spread * self.size**2


class Sample:
    """About `budget` bytes of the documents of a config's source."""

    def __init__(self, config: PrepareConfig, budget: int) -> None:
        self._config = config
        self.left_out: Counter[str] = Counter()
        source = config.source
        added_up = source.stopping_strategy == "all_exhausted_without_replacement"
        singles: Sequence[SingleSource] = source.sources if added_up else (source,)
        self.parts = [self._read(single, budget // len(singles)) for single in singles]

    @property
    def stretches(self) -> list[Stretch]:
        """Of all parts."""
        return [stretch for part in self.parts for stretch in part.stretches]

    @property
    def whole(self) -> bool:
        """Whether the source was read to its end."""
        return all(part.whole for part in self.parts)

    def _read(self, source: SingleSource, budget: int) -> Part:
        if source.kind == "parquet":
            return self._read_groups(source, budget) or self._read_head(source, budget)
        if source.kind in ("jsonl", "text"):
            return self._read_files(source, budget)
        return self._read_head(source, budget)

    def _kept(self, records: Iterator[Record]) -> Iterator[str]:
        """The texts of records; what has none is counted, or refused."""
        for record in records:
            if record.problem and self._config.on_error == "refuse":
                raise ValueError(f"{record.at}; or leave such records out with --on_error skip")
            if record.problem or not record.text or record.text.isspace():
                self.left_out[record.problem or "empty"] += 1
            else:
                yield record.text

    def _read_files(self, source: SingleSource, budget: int) -> Part:
        files = matching(source.patterns)
        sizes = np.array([os.path.getsize(file) for file in files])
        compressed = np.array([file.endswith(COMPRESSED) for file in files])
        one_a_file = source.kind == "text" and source.split in (None, "file")
        part = Part([], float(sizes.sum()), whole=False, records=len(files) if one_a_file else None)
        if sizes.sum() <= budget and not (compressed.any() and sizes.sum() > budget // 8):
            part.whole = True
            part.stretches = [self._stretch(source, file, 0, float("inf")) for file in files]
            return part
        count = _COMPRESSED_STRETCHES if compressed.mean() > 0.5 else _STRETCHES
        small: dict[int, Stretch] = {}
        for index, offset in _spread(sizes, count):
            length = _COMPRESSED_BYTES if compressed[index] else budget // count
            if index in small:
                small[index].places += 1
                continue
            if sizes[index] <= 2 * length or compressed[index]:
                stretch = small[index] = self._stretch(source, files[index], 0, 2 * length)
            else:
                stretch = self._stretch(source, files[index], offset, length)
            if stretch.size:
                part.stretches.append(stretch)
        if len(small) == len(files) and all(sizes[index] == stretch.size for index, stretch in small.items()):
            part.whole = True
        return part

    def _stretch(self, source: SingleSource, file: str, offset: int, length: float) -> Stretch:
        """Records from the first that begins after `offset`, or at 0, until they have taken `length` bytes."""
        size = os.path.getsize(file)
        split = source.split.separator if isinstance(source.split, Separator) else source.split or "file"
        one_a_file = source.kind == "text" and split == "file"
        compressed = file.endswith(COMPRESSED)
        with open(file, "rb") as opened:
            if one_a_file and length < size and not compressed:
                return self._piece(opened, offset, int(length), size)
            raw: IO[bytes] = opened
            if compressed and length < size and not one_a_file:
                raw, size = io.BytesIO(opened.read(int(length))), int(length)
            if offset:
                raw.seek(offset)
                raw.readline()
            begin = raw.tell()
            records = read_records(file, file, source.kind, source.column or "text", split, raw=raw)
            if raw is not opened:
                records = (record for record in records if record.problem != "unreadable_file")  # it was cut by us
            if offset and split not in ("file", "line"):
                next(records, None)  # begins before the offset
            texts: list[str] = []
            taken = 0
            for text in self._kept(records):
                texts.append(text)
                # A reader that looks for separators is ahead of what it gives.
                taken += len(text.encode()) + len(split.encode())
                reached = taken if isinstance(source.split, Separator) else opened.tell() - begin
                if reached >= length and not compressed:
                    return Stretch(reached, texts)
        return Stretch(size - begin, texts)

    def _piece(self, raw: IO[bytes], offset: int, length: int, size: int) -> Stretch:
        """A part of a document that is a whole file."""
        raw.seek(offset)
        content = raw.read(length)
        if size > (self._config.max_bytes or size):
            self.left_out["too_long"] += 1
            return Stretch(len(content), [])
        return Stretch(len(content), [content.decode(errors="ignore")])

    def _read_groups(self, source: SingleSource, budget: int) -> Part | None:
        """Row groups of Parquet files; None where they are few enough to read them all, or tell nothing."""
        column = source.column or "text"
        groups: list[tuple[str, int, int, int]] = []
        for file in matching(source.patterns):
            try:
                metadata = pq.read_metadata(file)
            except pa.ArrowException:
                return None  # the reader says what is wrong with it, or leaves it out
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                chunks = [group.column(i) for i in range(group.num_columns)]
                size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
                groups.append((file, number, group.num_rows, size))
        sizes = np.array([size for *_, size in groups])
        if sizes.sum() <= budget:
            return None
        part = Part([], float(sizes.sum()), whole=False, records=sum(rows for *_, rows, _ in groups))
        count = min(_STRETCHES, max(_COMPRESSED_STRETCHES, len(groups)))
        for index, places in Counter(index for index, _ in _spread(sizes, count)).items():
            file, number, rows, size = groups[index]
            texts: list[str] = []
            seen = 0
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(8, [number], [column]):
                    records = [Record(text or "") for text in batch.column(0).to_pylist()]
                    texts += self._kept(iter(records))
                    seen += len(batch)
                    if sum(map(len, texts)) >= places * budget / count:
                        break
            if seen:
                part.stretches.append(Stretch(size * seen / rows, texts, places))
        return part

    def _read_head(self, source: SingleSource, budget: int) -> Part:
        from sinkbed.data.source.loading import known_records

        alone = source if isinstance(source, Source) else Source(**vars(source))
        documents = Documents(streamed(alone), on_error=self._config.on_error)
        texts: list[str] = []
        read = 0
        for text in documents:
            texts.append(text)
            read += len(text)
            if read >= budget:
                break
        ended = read < budget
        self.left_out += documents.left_out
        seen = len(texts) + documents.left_out.total()
        records = None if ended else known_records(source)
        return Part([Stretch(seen, texts)], seen if ended else records, ended, records)


def _spread(sizes: NDArray[np.int64], count: int) -> Iterator[tuple[int, int]]:
    """(which, offset in it) of places at equal distances in what has these sizes, laid end to end."""
    ends = np.cumsum(sizes)
    places = ((np.arange(count) + 0.5) * ends[-1] / count).astype(np.int64)
    for index, place in zip(np.searchsorted(ends, places, side="right").tolist(), places.tolist(), strict=True):
        yield index, int(place - ends[index] + sizes[index])


def streamed(source: Source) -> Source:
    """The same source in its own order, read without a copy."""
    if source.kind == "mixture":
        return replace(source, sources=tuple(_single(part) for part in source.sources))
    return _single(source)


def _single(source: S) -> S:
    if source.kind == "demo":  # in memory anyway, and its long documents stand at its end
        return source
    return replace(source, streaming=True, shuffle_seed=None, shuffle_buffer=None)
