"""Records of JSONL, JSON, Parquet and text files, read so that one bad record costs one record.

The readers of `datasets` give up on a whole file at its first malformed line, and hold all files to the schema of
the first, turning numbers of later ones into text. This one is a builder of `datasets` like its own (so
streaming, shuffling, the cache and the hub are the library's), but reads record by record, keeps the text
alone, holds each file to text by itself, and passes on what is wrong instead of raising: `documents`
decides whether to refuse or to leave it out.

Compression is told by the end of a file's name: .gz, .bz2, .xz, .zst.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import posixpath
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key

_TABLE_ROWS = 256  # of Parquet in memory at a time
_TABLE_BYTES = 1 << 20  # of text in a table handed to `datasets`; bounds memory and latency
_READ_VERSION = "5"  # part of the cache's name: raise it when the same files give other records
_SHOWN = 60  # characters of an offending line in a message
_MARK = b"\xef\xbb\xbf"  # of byte order
_UNREADABLE = (EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowException)

FEATURES = datasets.Features(
    {name: datasets.Value(kind) for name, kind in (("text", "large_string"), ("problem", "string"), ("at", "string"))}
)


class Record(NamedTuple):
    """A document's text, or else which problem it has and where and why."""

    text: str | None
    problem: str | None = None
    """None, `malformed`, `encoding`, `missing_column`, `not_text` or `unreadable_file`."""
    at: str | None = None
    """File, line, and what was found there."""


@dataclass
class RecordsConfig(datasets.BuilderConfig):
    """What `Records` reads."""

    format: str = "jsonl"
    """`jsonl`: a document a line, or an array of them a file. `parquet`: a document a record. `text`: see `split`."""
    column: str = "text"
    """jsonl, parquet: where the text is."""
    split: str = "file"
    """text: a document is a `file`, a `line`, what stands between blank lines (`blank_line`), or between
    occurrences of any other text."""


class Records(datasets.ArrowBasedBuilder):
    """Builder of `datasets` with columns `text`, `problem` and `at` (see `Record`)."""

    BUILDER_CONFIG_CLASS = RecordsConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(hash=_READ_VERSION, **arguments)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        generators = []
        for split, names in self.config.data_files.items():
            # Local names are taken as they are: the library reads a meaning into `::` and `[`.
            paths = [str(name) if os.path.isfile(name) else dl_manager.download(name) for name in names]
            files = list(zip(paths, map(str, names), strict=True))
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"files": files}))
        return generators

    def _generate_tables(self, files: list[tuple[str, str]]) -> Iterator[tuple[Key, pa.Table]]:
        c = self.config
        for file_number, (path, name) in enumerate(files):
            for number, table in enumerate(read_tables(path, name, c.format, c.column, c.split)):
                yield Key(file_number, number), table


def read_tables(path: str, name: str, format: str, column: str, split: str = "file") -> Iterator[pa.Table]:
    """The records of one file as tables of `FEATURES`, in order; arguments as of `read_records`."""
    if format != "parquet":
        yield from _gathered(read_records(path, name, format, column, split))
        return
    try:
        with _opened(path) as file:
            yield from parquet_tables(file, name, column)
    except _UNREADABLE as error:
        _raise_missing(error)
        message = f"{name}: could not be read as parquet ({error}); check source.kind, or copy the file again"
        yield _table([Record(None, "unreadable_file", message)])


def read_records(
    path: str, name: str, format: str, column: str, split: str = "file", raw: IO[bytes] | None = None
) -> Iterator[Record]:
    """The records of one file of JSONL or text, in order.

    Args:
        path: a local path, or a URL of the hub.
        name: what to call the file; its end tells the compression.
        format, column, split: see `RecordsConfig`.
        raw: the opened file, for callers that want to know how far it was read. None: open `path`.
    """
    number = 0
    try:
        with raw or _opened(path) as file, decompressed(file, name) as stream:
            if format == "text" and split == "file":
                yield decoded(stream.read(), name)
                return
            if format == "text":
                what = "line" if split == "line" else "document"
                for content in cut(stream, split):  # not by `enumerate`, which would keep a long one
                    number += 1
                    record = decoded(content, f"{name}, {what} {number}", marked=number == 1)
                    del content
                    yield record
                return
            begun = False
            for number, line in enumerate(stream, 1):
                if line.isspace():
                    continue
                if not begun and line.removeprefix(_MARK).lstrip().startswith(b"["):
                    yield from _array(line + stream.read(), name, column)
                    return
                begun = True
                yield _parsed(line, f"{name}, line {number}", column)
    except _UNREADABLE as error:
        _raise_missing(error)
        hint = ""
        if "requires too much memory" in str(error):
            hint = f"; its window is too long, so compress it anew: zstd -d --long=31 < {name} | zstd"
        what = "line" if format == "jsonl" or split == "line" else "document"
        message = f"{name}, after {what} {number}: cannot be read on ({error}){hint}"
        yield Record(None, "unreadable_file", message)


def _opened(path: str) -> IO[bytes]:
    # `datasets` has put its own `open` into this module, which takes URLs and retries, and reads a meaning into `::`.
    return io.open(path, "rb") if os.path.isfile(path) else open(path, "rb")  # noqa: UP020


def _raise_missing(error: BaseException) -> None:
    """Raise what is no bad data: of a missing or forbidden file nothing can be said."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def cut(stream: Any, split: str) -> Iterator[bytes]:
    """Documents of a text by lines, blank lines or a separator, without the line ends around them.

    Lines end with a line feed, or with a carriage return before it, which is read as a line feed alone; other line
    ends of Unicode are text.
    """
    if split == "line":
        # By `map`, which keeps no long line beside its text.
        yield from map(_without_end, stream)
    elif split == "blank_line":
        gathered: list[bytes] = []
        for line in stream:
            if not line.isspace():
                gathered.append(_without_end(line))
            elif gathered:
                yield b"\n".join(gathered)
                gathered = []
        if gathered:
            yield b"\n".join(gathered)
    else:
        separator, rest = split.replace("\r\n", "\n").encode(), bytearray()
        while block := stream.read(_TABLE_BYTES):
            while block.endswith(b"\r") and (more := stream.read(1)):
                block += more
            begin = max(0, len(rest) - len(separator) + 1)
            rest += block.replace(b"\r\n", b"\n")
            while (end := rest.find(separator, begin)) >= 0:
                yield _between(rest, end)
                del rest[: end + len(separator)]
                begin = 0
        if rest and not rest.isspace():  # a separator may be the last line
            yield _between(rest, len(rest))


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _between(rest: bytearray, end: int) -> bytes:
    """A document without the ends of the lines that separators stand on."""
    return bytes(memoryview(rest)[rest.startswith(b"\n", 0, end) : end - rest.endswith(b"\n", 0, end)])


def parquet_tables(
    file: IO[bytes], name: str, column: str, groups: range | None = None, rows: int | None = None
) -> Iterator[pa.Table]:
    """The records of a Parquet file as tables of `FEATURES`; of the row groups in `groups` alone, `rows` at a time,
    where these are given."""
    parquet = pq.ParquetFile(file)
    if column not in parquet.schema_arrow.names:
        if parquet.metadata.num_rows:
            yield _table([_missing(parquet.schema_arrow.names, name, column)])
        return
    kind = parquet.schema_arrow.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        if parquet.metadata.num_rows:
            yield _table([_not_text(name, column, f"values of type {kind}")])
        return
    counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    groups = range(len(counts)) if groups is None else groups
    size = rows or _TABLE_ROWS
    number = sum(counts[: groups.start])
    for batch in chain.from_iterable(parquet.iter_batches(size, [group], [column]) for group in groups):
        texts = batch.column(0).cast(pa.large_string())
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid:  # bytes that are no UTF-8 somewhere
            raws = enumerate(texts.cast(pa.large_binary()).to_pylist(), number + 1)
            yield _table([decoded(raw or b"", f"{name}, record {index}", marked=False) for index, raw in raws])
        else:
            nothing = pa.nulls(len(texts), pa.string())
            yield pa.table({"text": texts, "problem": nothing, "at": nothing}, schema=FEATURES.arrow_schema)
        number += len(batch)


def decompressed(file: IO[bytes], name: str) -> Any:
    """The binary stream inside `file`, by the end of `name`."""
    end = posixpath.splitext(name)[1]
    if end == ".gz":
        return gzip.open(file)
    if end == ".bz2":
        return bz2.open(file)
    if end == ".xz":
        return lzma.open(file)
    if end == ".zst":  # pyarrow's reads several frames and notices a truncated one
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), 1 << 14)
    return file


def decoded(content: bytes, where: str, marked: bool = True) -> Record:
    """A document of these bytes; `marked`: it may begin with a byte order mark."""
    try:
        return Record(content.decode("utf-8-sig" if marked else "utf-8"))
    except UnicodeDecodeError as error:
        return Record(None, "encoding", f"{where}: expected UTF-8, got other bytes ({error})")


def _loads(content: bytes) -> Any:
    """JSON in UTF-8; a byte order mark opens files of some Windows programs. Raises as `json.loads`."""
    text = content.removeprefix(_MARK).decode()
    try:
        return json.loads(text)
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        return json.loads(text, parse_int=lambda digits: 0)  # longer than Python converts, and no text either way


def _parsed(line: bytes, where: str, column: str) -> Record:
    try:
        record = _loads(line)
    except UnicodeDecodeError as error:
        return Record(None, "encoding", f"{where}: expected UTF-8, got other bytes ({error})")
    except (ValueError, RecursionError) as error:
        start = line[:_SHOWN].decode(errors="replace").strip()
        return Record(None, "malformed", f"{where}: expected JSON, got {start!r} ({error})")
    return _text_of(record, where, column)


def _array(content: bytes, name: str, column: str) -> Iterator[Record]:
    """Records of a file that is one JSON array of them; a line of JSONL that is an array is no record."""
    try:
        records = _loads(content)
    except (ValueError, RecursionError):
        records = None
    if isinstance(records, list) and any(isinstance(record, dict) for record in records):
        for number, record in enumerate(records, 1):
            yield _text_of(record, f"{name}, record {number}", column)
        return
    for number, line in enumerate(io.BytesIO(content), 1):
        if not line.isspace():
            yield _parsed(line, f"{name}, line {number}", column)


def _text_of(record: Any, where: str, column: str) -> Record:
    if not isinstance(record, dict):
        return Record(None, "malformed", f"{where}: expected a JSON object, got a {type(record).__name__}")
    if column not in record:
        return _missing(record, where, column)
    text = record[column]
    if text is None:
        return Record("")
    if not isinstance(text, str):
        return _not_text(where, column, f"a value of type {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud800" is JSON, and half a character
            return Record(None, "encoding", f"{where}: expected text that UTF-8 can hold, got other ({error})")
    return Record(text)


def _missing(columns: Iterable[str], where: str, column: str) -> Record:
    named = ", ".join(map(repr, columns)) or "none"
    message = f"{where}: expected a column {column!r}, got {named}; name the one that holds the text with source.column"
    return Record(None, "missing_column", message)


def _not_text(where: str, column: str, what: str) -> Record:
    message = f"{where}: column {column!r}: expected text, got {what}; name another column with source.column"
    return Record(None, "not_text", message)


def _table(records: list[Record]) -> pa.Table:
    return pa.table(dict(zip(FEATURES, zip(*records, strict=True), strict=True)), schema=FEATURES.arrow_schema)


def _gathered(records: Iterator[Record]) -> Iterator[pa.Table]:
    """Records by the megabyte; of a long text one copy at a time."""
    gathered: list[Record] = []
    size = 0
    while record := next(records, None):
        gathered.append(record)
        size += len(record.text or "") + 64
        del record
        if size >= _TABLE_BYTES:
            table = _table(gathered)
            gathered, size = [], 0
            yield table
            del table
    if gathered:
        yield _table(gathered)
