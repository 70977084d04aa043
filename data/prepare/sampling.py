"""Samples of a source, spread over it, from which sizes of the whole are inferred.

A local source is a long row of bytes, file after file, each file cut into cells of equal length. The cells at places
of equal distance are sampled, so that a file counts by its size; a cell tells what a byte there comes to, in bytes of
text, documents or tokens. Their mean, times all bytes, is the estimate, and their spread its error. Of a text the
bytes of a cell are read, of JSONL the records from its beginning on, the lines being counted by themselves at more
places: records that are met so are longer than others. Of compressed files and row groups of Parquet the beginning is
read.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from sinkbed.data.prepare.config import PrepareConfig
from sinkbed.data.source.config import Separator, SingleSource, Source
from sinkbed.data.source.documents import Documents
from sinkbed.data.source.local_files import COMPRESSED, local_files
from sinkbed.data.source.records import Record, cut, decoded, parquet_tables, read_records

S = TypeVar("S", bound=SingleSource)

_STRETCHES = 256
_PIECES = 1024  # of texts: they need not be whole, so they may be small
_LINE_PLACES = 4096
_LINE_BYTES = 2**14
_COMPRESSED_STRETCHES = 16
_COMPRESSED_BYTES = 2**20  # of a compressed file: what its decompressor keeps back at the end is little beside them


@dataclass
class Stretch:
    """Some records of a source, one after the other."""

    size: float
    """How much of the source they take, in the unit of `Part.size`."""
    texts: list[str]
    places: int = 1
    """How many of the sampled places fall into it."""
    share: float = 1.0
    """Documents that each text stands for: less than one where it is a piece."""


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
                raise ValueError(f"{record.at}; to leave such records out: --on_error skip")
            if record.problem or not record.text or record.text.isspace():
                self.left_out[record.problem or "empty"] += 1
            else:
                yield record.text

    def _read_files(self, source: SingleSource, budget: int) -> Part:
        files = local_files(source)
        sizes = {file: os.path.getsize(file) for file in files}
        bounds = np.array(list(sizes.values()))
        total = int(bounds.sum())
        compressed = [file.endswith(COMPRESSED) for file in files]
        one_a_file = source.kind == "text" and source.split in (None, "file")
        everything = Counter({(file, 0, size): 1 for file, size in sizes.items()})
        cells = everything
        if total > (budget // 8 if any(compressed) else budget):
            count = _PIECES if source.kind == "text" else _STRETCHES
            count = _COMPRESSED_STRETCHES if sum(compressed) > len(files) / 2 else count
            places = _spread(bounds, count)
            cells = Counter(self._cell(source, files[index], offset, budget // count) for index, offset in places)
        stretches = [self._stretch(source, *cell, places) for cell, places in cells.items()]
        part = Part(
            stretches, total, whole=cells.keys() == everything.keys(), records=len(files) if one_a_file else None
        )
        arrays = source.kind == "jsonl" and any(_is_array(file) for file, *_ in cells)
        if source.kind == "jsonl" and not (part.whole or arrays or any(compressed)):
            lines = _lines_a_byte(files, bounds) * total
            read, _ = part.total([len(stretch.texts) for stretch in stretches])
            for stretch in stretches:
                stretch.share = lines / max(1.0, read)
        return part

    def _cell(self, source: SingleSource, file: str, offset: int, length: int) -> tuple[str, int, int]:
        """The file, and from where to where it is read, for a place in it."""
        size = os.path.getsize(file)
        if file.endswith(COMPRESSED):
            in_one = source.kind == "text" and source.split in (None, "file")
            return file, 0, size if in_one else min(size, _COMPRESSED_BYTES)
        if source.kind == "jsonl" and _is_array(file):
            return file, 0, size
        return file, *_around(offset, size, length)

    def _stretch(self, source: SingleSource, file: str, begin: int, end: int, places: int) -> Stretch:
        """What lies between two offsets of a file; of JSONL whole lines, from the first that begins there on."""
        size = os.path.getsize(file)
        split = source.split.separator if isinstance(source.split, Separator) else source.split or "file"
        with open(file, "rb") as raw:
            raw.seek(begin)
            if source.kind == "jsonl" and begin:
                raw.seek(begin - 1)
                raw.readline()
                if raw.tell() == size:  # its last record began before
                    raw.seek(0)
            content = raw.read(end - begin)
            if source.kind == "jsonl" and not (file.endswith(COMPRESSED) or content.endswith(b"\n")):
                content += raw.readline()
        if source.kind == "text" and not file.endswith(COMPRESSED) and len(content) < size:
            texts, share = self._pieces(content, file, split, begin, size)
            return Stretch(len(content), texts, places, share)
        records = read_records(file, file, source.kind, source.column or "text", split, raw=io.BytesIO(content))
        if len(content) < size:  # it is our cut that a decompressor complains of
            records = (record for record in records if record.problem != "unreadable_file")
        return Stretch(len(content), list(self._kept(records)), places)

    def _pieces(self, content: bytes, file: str, split: str, begin: int, size: int) -> tuple[list[str], float]:
        """The documents of a text of which these bytes are a part, where the first and the last may be cut off, and
        what share of a document each is."""
        if split == "file":
            if size > (self._config.max_bytes or size):
                self.left_out["too_long"] += 1
                return [], 1.0
            return [content.decode(errors="ignore")], len(content) / size
        end = begin + len(content)
        texts: list[str] = []
        begun = 0
        pieces = list(cut(io.BytesIO(content), split))
        for number, piece in enumerate(pieces):
            goes_on = number == 0 and begin > 0
            if goes_on or (number == len(pieces) - 1 and end < size):
                if not piece.strip():
                    continue
                record = Record(piece.decode(errors="ignore"))  # a character may be cut in two
            else:
                record = decoded(piece, f"{file}, in bytes {begin:,} to {end:,}", marked=number == 0)
            kept = list(self._kept(iter([record])))
            texts += kept
            begun += 0 if goes_on else len(kept)
        return texts, begun / max(1, len(texts))

    def _read_groups(self, source: SingleSource, budget: int) -> Part | None:
        """Row groups of Parquet files; None where they are few enough to read them all, or tell nothing."""
        column = source.column or "text"
        groups: list[tuple[str, int, int, int]] = []
        for file in local_files(source):
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
            with open(file, "rb") as raw:
                for table in parquet_tables(raw, file, column, range(number, number + 1), rows=8):
                    texts += self._kept(Record(**row) for row in table.to_pylist())
                    seen += len(table)
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


def _is_array(file: str) -> bool:
    """Whether a JSON file is one array of records, in which none can be found without reading all before it."""
    with open(file, "rb") as opened:
        return opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _spread(sizes: NDArray[np.int64], count: int) -> Iterator[tuple[int, int]]:
    """(which, offset in it) of places at equal distances in what has these sizes, laid end to end."""
    ends = np.cumsum(sizes)
    places = ((np.arange(count) + 0.5) * ends[-1] / count).astype(np.int64)
    for index, place in zip(np.searchsorted(ends, places, side="right").tolist(), places.tolist(), strict=True):
        yield index, int(place - ends[index] + sizes[index])


def _around(offset: int, size: int, length: int) -> tuple[int, int]:
    """Where the cell of about `length` bytes that an offset in a file falls into begins and ends."""
    number = max(1, size // length)
    cell = offset * number // size
    return size * cell // number, size * (cell + 1) // number


def _lines_a_byte(files: Sequence[str], sizes: NDArray[np.int64]) -> float:
    """How many lines begin at a byte, on average, counted in cells all over the files."""
    rates = []
    for index, offset in _spread(sizes, _LINE_PLACES):
        begin, end = _around(offset, int(sizes[index]), _LINE_BYTES)
        before = max(0, begin - 1)
        with open(files[index], "rb") as opened:
            opened.seek(before)
            rates.append(((begin == 0) + opened.read(end - 1 - before).count(b"\n")) / (end - begin))
    return sum(rates) / len(rates)


def streamed(source: Source) -> Source:
    """The same source in its own order, read without a copy."""
    if source.kind == "mixture":
        return replace(source, sources=tuple(_single(part) for part in source.sources))
    return _single(source)


def _single(source: S) -> S:
    if source.kind == "demo":  # in memory anyway, and its long documents stand at its end
        return source
    return replace(source, streaming=True, shuffle_seed=None, shuffle_buffer=None)
