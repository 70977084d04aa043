"""Records of JSONL and text files, read so that one bad record costs one record.

The JSON reader of `datasets` gives up on a whole file at its first malformed line, and needs one schema for
all columns of all files. This one is a builder of `datasets` like its own (so streaming, shuffling, the
cache and the hub are the library's), but reads line by line, keeps the text alone, and passes on what is
wrong with a record instead of raising: `data.sources` decides whether to refuse or to leave it out.

Compression is told by the end of a file's name: .gz, .bz2, .xz, .zst.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import posixpath
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.builder import Key

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_TABLE_BYTES = 1 << 20  # of text in a table handed to `datasets`; bounds memory and latency
_READ_VERSION = "1"  # part of the cache's name: raise it when the same files give other records
_SHOWN = 60  # characters of an offending line in a message

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
    """`jsonl`: a document a line. `text`: a document a file."""
    column: str = "text"
    """jsonl: key of the text."""


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
            files = [(path, str(name)) for path, name in zip(dl_manager.download(list(names)), names, strict=True)]
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"files": files}))
        return generators

    def _generate_tables(self, files: list[tuple[str, str]]) -> Iterator[tuple[Key, pa.Table]]:
        for file_number, (path, name) in enumerate(files):
            for number, records in enumerate(_tables(read_records(path, name, self.config.format, self.config.column))):
                columns = list(zip(*records, strict=True))
                table = pa.table(dict(zip(FEATURES, columns, strict=True)), schema=FEATURES.arrow_schema)
                yield Key(file_number, number), table


def read_records(path: str, name: str, format: str, column: str, raw: IO[bytes] | None = None) -> Iterator[Record]:
    """The records of one file, in order.

    Args:
        path: a local path, or a URL of the hub.
        name: what to call the file; its end tells the compression.
        raw: the opened file, for callers that want to know how far it was read. None: open `path`.
    """
    shown = posixpath.basename(name)
    number = 0
    try:
        # `datasets` has put its own `open` into this module, which takes URLs and retries.
        with raw or open(path, "rb") as file, decompressed(file, name) as stream:
            if format == "text":
                yield _decoded(stream.read(), shown)
                return
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    yield _parsed(line, f"{shown}, line {number}", column)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        # A missing or forbidden file is no bad data: nothing could be said of what it holds.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Record(None, "unreadable_file", f"{shown}, after line {number}: cannot be read on ({error})")


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
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), 1 << 20)
    return file


def _decoded(content: bytes, shown: str) -> Record:
    try:
        return Record(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(None, "encoding", f"{shown}: found bytes that are no UTF-8 ({error})")


def _parsed(line: bytes, where: str, column: str) -> Record:
    try:
        # A byte order mark opens files of some Windows programs.
        record = json.loads(line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8"))
    except UnicodeDecodeError as error:
        return Record(None, "encoding", f"{where}: found bytes that are no UTF-8 ({error})")
    except (ValueError, RecursionError) as error:
        start = line[:_SHOWN].decode(errors="replace").strip()
        return Record(None, "malformed", f"{where}: found no JSON ({error}) in {start!r}")
    if not isinstance(record, dict):
        return Record(None, "malformed", f"{where}: found a JSON {type(record).__name__}, expected an object")
    if column not in record:
        found = ", ".join(map(repr, record)) or "none"
        return Record(
            None,
            "missing_column",
            f"{where}: found columns {found}, expected {column!r}; name the one that holds the text with source.column",
        )
    text = record[column]
    if text is None:
        return Record("")
    if not isinstance(text, str):
        return Record(
            None,
            "not_text",
            f"{where}: column {column!r}: found a value of type {type(text).__name__}, expected text; "
            "name another column with source.column",
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud800" is JSON, and half a character
            return Record(None, "encoding", f"{where}: found text that UTF-8 cannot hold ({error})")
    return Record(text)


def _tables(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Records by the megabyte."""
    gathered: list[Record] = []
    size = 0
    for record in records:
        gathered.append(record)
        size += len(record.text or "") + 64
        if size >= _TABLE_BYTES:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered
