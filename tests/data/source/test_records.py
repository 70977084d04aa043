"""Records are read one by one, whatever the compression, and a bad one is named, or left out and counted."""

import bz2
import dataclasses
import datetime
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config

from sinkbed.data.prepare.recipe import source_identity
from sinkbed.data.source import records
from sinkbed.data.source.config import Separator, Source
from sinkbed.data.source.documents import Documents
from sinkbed.data.source.records import Record, read_records

TEXTS = [f"document {i}: été\u2028 \x85 \U0001f600" for i in range(50)]  # with line ends that are none in JSONL


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def zstd(content: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    half = len(content) // 2
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:]))


def members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": members,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
JSONL = "".join(json.dumps({"text": text, "meta": {"a": [1]}}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize("end", COMPRESSIONS)
@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_files_give_the_same_documents(end: str, streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / f"corpus.jsonl{end}"
    path.write_bytes(COMPRESSIONS[end](JSONL))
    source = Source(kind="jsonl", files=str(path), streaming=streaming, shuffle_seed=None)
    assert list(Documents(source)) == TEXTS
    book = tmp_path / f"book.txt{end}"
    book.write_bytes(COMPRESSIONS[end](JSONL))
    assert list(Documents(Source(kind="text", files=str(book), streaming=streaming))) == [JSONL.decode()]


@pytest.mark.parametrize("end", [end for end in COMPRESSIONS if end])
def test_a_compressed_file_cut_short_is_named_and_gives_what_it_holds_when_skipped(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.jsonl{end}"
    path.write_bytes(COMPRESSIONS[end](JSONL)[:-20])
    source = Source(kind="jsonl", files=str(path), streaming=True, shuffle_seed=None)
    with pytest.raises(ValueError, match=r"cut\.jsonl.*after line \d+: cannot be read on"):
        list(Documents(source))
    (tmp_path / "whole.jsonl").write_bytes(JSONL)
    documents = Documents(Source(kind="jsonl", files=str(tmp_path / "*"), shuffle_seed=None), on_error="skip")
    found = list(documents)
    assert found[-50:] == TEXTS and found[:-50] == TEXTS[: len(found) - 50]
    assert documents.left_out["unreadable_file"] == 1


BAD = {
    b'{"text": ': ("malformed", "line 2: expected JSON, got"),
    b"[1, 2]": ("malformed", "line 2: expected a JSON object, got a list"),
    b'"text"': ("malformed", "line 2: expected a JSON object, got a str"),
    b"[" * 100_000: ("malformed", "line 2: expected JSON, got"),
    b'{"text": "\xff\xfe"}': ("encoding", "line 2: expected UTF-8"),
    b'{"text": "half \\ud800"}': ("encoding", "line 2: expected text that UTF-8 can hold"),
    b'{"body": "a", "n": 1}': ("missing_column", r"line 2: expected a column 'text', got 'body', 'n'.*source\.column"),
    b"{}": ("missing_column", "line 2: expected a column 'text', got none"),
    b'{"text": 5}': ("not_text", "line 2: column 'text': expected text, got a value of type int"),
    b'{"text": ["a"]}': ("not_text", "got a value of type list"),
    b'{"text": null}': ("empty", ""),
    b'{"text": " \\n"}': ("empty", ""),
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:20].decode(errors="replace"))
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_record_is_refused_by_file_and_line_or_left_out_and_counted(
    line: bytes, streaming: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n\n  \n{"text": "after"}')
    source = Source(kind="jsonl", files=str(tmp_path / "a.jsonl"), streaming=streaming, shuffle_seed=None)
    kind, message = BAD[line]
    if message:
        with pytest.raises(ValueError, match=rf"a\.jsonl, .*{message}(.|\n)*--on_error skip"):
            list(Documents(source))
    documents = Documents(source, on_error="skip")
    assert list(documents) == ["before", "after"]
    assert documents.left_out == {kind: 1}


def test_text_that_is_no_utf8_is_left_out_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfabc\r\n")
    source = Source(kind="text", files=str(tmp_path / "*.txt"), shuffle_seed=None)
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8"):
        list(Documents(source))
    documents = Documents(source, on_error="skip")
    assert list(documents) == ["abc\r\n"], "the byte order mark is no text, the line end is"
    assert documents.left_out == {"encoding": 1}


def test_a_file_that_changes_is_read_anew_without_streaming(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in ("one", "three"):
        path.write_text(json.dumps({"text": text}))
        assert list(Documents(Source(kind="jsonl", files=str(path)))) == [text]


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_a_file_of_the_same_size_and_time_with_another_text_is_read_anew(kind: Any, tmp_path: Path) -> None:
    """Regression: the library's cache tells files apart by size and time, the recipe by contents."""
    path = tmp_path / "corpus.data"

    def read(text: str) -> list[str]:
        if kind == "parquet":
            pq.write_table(pa.table({"text": [text] * 3}), path)
        else:
            path.write_text("\n".join([json.dumps({"text": text})] * 3) if kind == "jsonl" else text)
        os.utime(path, (10**9, 10**9))
        return list(Documents(Source(kind=kind, files=str(path))))

    first, size = read("old text"), path.stat().st_size
    second = read("new text")
    assert path.stat().st_size == size
    assert set(first) == {"old text"} and set(second) == {"new text"}


def test_a_damaged_block_of_a_compressed_file_is_a_bad_record(tmp_path: Path) -> None:
    """Regression: zlib has an error of its own, for which nothing was said."""
    lines = [json.dumps({"text": f"{i} {i * i}"}) for i in range(5_000)]
    content = bytearray(gzip.compress("\n".join(lines).encode(), mtime=0))
    path = tmp_path / "corpus.jsonl.gz"
    problems = set()
    for place in range(2000, len(content) - 600, 2000):
        path.write_bytes(content[:place] + bytes(512) + content[place + 512 :])
        found = list(read_records(str(path), path.name, "jsonl", "text"))
        problems |= {(record.at or "").partition("(")[2][:8] for record in found if record.problem == "unreadable_file"}
    assert any(problem.startswith("Error -3") for problem in problems), "zlib's own error occurs"


def test_long_files_are_handed_over_in_pieces(tmp_path: Path) -> None:
    texts = ["x" * 300_000 + str(i) for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    records = read_records(str(tmp_path / "a.jsonl"), "a.jsonl", "jsonl", "text")
    assert next(records) == Record(texts[0])
    assert list(Documents(Source(kind="jsonl", files=str(tmp_path / "a.jsonl"), shuffle_seed=None))) == texts


def both(source: Source, message: str) -> Documents:
    """Documents that leave out what is refused, after the refusal was seen in both ways of reading."""
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(Documents(dataclasses.replace(source, streaming=streaming)))
    return Documents(source, on_error="skip")


@pytest.mark.parametrize(
    "values",
    [[1, 2], [True], [0.5, None], [datetime.datetime(1970, 1, 1)], [["a"]], [b"bytes"]],
    ids=["int", "bool", "float", "time", "list", "bytes"],
)
@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_a_later_parquet_file_is_held_to_text_and_named(values: list[Any], kind: Any, tmp_path: Path) -> None:
    """Regression: the first file decided, and numbers of later ones became documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["one", None]}), folder / "train-0.parquet")
    pq.write_table(pa.table({"text": values}), folder / "train-1.parquet")
    pq.write_table(pa.table({"body": ["other"]}), folder / "train-2.parquet")
    where = {"files": f"{folder}/*"} if kind == "parquet" else {"name": str(folder)}
    documents = both(
        Source(kind=kind, shuffle_seed=None, **where),
        rf"{folder}/train-1\.parquet: column 'text': expected text, got values of type .*--on_error skip",
    )
    assert list(documents) == ["one"]
    assert documents.left_out == {"empty": 1, "not_text": 1, "missing_column": 1}


def test_a_json_array_of_the_hub_is_held_to_text_record_by_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two", "n": 1}], indent=2))
    (tmp_path / "b.json").write_text(json.dumps([{"text": 7}, {"text": "three"}]))
    source = Source(kind="hub", name=str(tmp_path), shuffle_seed=None)
    documents = both(source, rf"{tmp_path}/b\.json, record 1: column 'text': expected text, got a value of type int")
    assert list(documents) == ["one", "two", "three"] and documents.left_out == {"not_text": 1}


def test_an_array_may_begin_after_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n \n[{"text": "one"},\n {"text": "two"}]\n')
    assert list(Documents(Source(kind="jsonl", files=str(tmp_path / "a.jsonl"), shuffle_seed=None))) == ["one", "two"]


def write_groups(path: Path, *groups: pa.Array) -> None:
    with pq.ParquetWriter(path, pa.schema([("text", groups[0].type)]), store_schema=True) as writer:
        for group in groups:
            writer.write_table(pa.table({"text": group}))


def test_memory_of_parquet_does_not_follow_its_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, pa.array(["a"]), pa.array(["b"] * 600))
    with open(path, "rb") as file:
        assert [len(table) for table in records.parquet_tables(file, "a", "text")] == [1, 256, 256, 88]


PARQUET: dict[str, list[pa.Array]] = {
    "an empty first row group": [pa.array([], pa.string()), pa.array(["a", "b"])],
    "row groups of different sizes": [pa.array(["a"]), pa.array(["b"])],
    "nothing but null": [pa.nulls(3)],
    "string view": [pa.array(["a", "b"], pa.string_view())],
    "large strings": [pa.array(["a", "b"], pa.large_string())],
    "a dictionary": [pa.array(["a", "b"]).dictionary_encode()],
}


@pytest.mark.parametrize("groups", PARQUET.values(), ids=PARQUET.keys())
@pytest.mark.parametrize("streaming", [False, True])
def test_every_parquet_column_of_text_is_read_beside_a_file_of_strings(
    groups: list[pa.Array], streaming: bool, tmp_path: Path
) -> None:
    write_groups(tmp_path / "a.parquet", *groups)
    write_groups(tmp_path / "b.parquet", pa.array(["c"]))
    documents = Documents(Source(kind="parquet", files=str(tmp_path / "*"), shuffle_seed=None, streaming=streaming))
    assert list(documents) == ([] if groups[0].type == pa.null() else ["a", "b"]) + ["c"]


def test_bytes_in_parquet_that_are_no_utf8_are_named_by_record(tmp_path: Path) -> None:
    raw = pa.array(["é", "good", "more"]).cast(pa.binary()).to_pylist()
    buffers = pa.array([b"\xff", *raw[1:]], pa.binary()).buffers()
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, buffers)})
    pq.write_table(table, tmp_path / "a.parquet")
    documents = both(
        Source(kind="parquet", files=str(tmp_path / "a.parquet"), shuffle_seed=None),
        rf"{tmp_path}/a\.parquet, record 1: expected UTF-8",
    )
    assert list(documents) == ["good", "more"] and documents.left_out == {"encoding": 1}


@pytest.mark.parametrize("folder", ["a[1]", "zip::b", "~c", "sp ace%20"])
@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_a_path_is_taken_as_it_is(kind: Any, folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "x[2]::y.data"
    path.parent.mkdir()
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a"]}), path)
    else:
        path.write_text('{"text": "a"}' if kind == "jsonl" else "a")
    for streaming in (False, True):
        assert list(Documents(Source(kind=kind, files=str(path), streaming=streaming))) == ["a"]


def test_a_damaged_parquet_file_is_named_or_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pq.write_table(pa.table({"text": [f"{name} {i} text" for i in range(500)]}), tmp_path / f"{name}.parquet")
    damaged = tmp_path / "b.parquet"
    content = bytearray(damaged.read_bytes())
    content[4:400] = bytes(396)
    damaged.write_bytes(content)
    source = Source(kind="parquet", files=str(tmp_path / "*"), shuffle_seed=None)
    documents = both(source, rf"{damaged}: could not be read as parquet")
    assert len(list(documents)) == 1000 and documents.left_out == {"unreadable_file": 1}


def test_a_long_number_beside_the_text_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "n": N}\n{"text": N}\n'.replace("N", "7" * 5000))
    source = Source(kind="jsonl", files=str(tmp_path / "a.jsonl"), shuffle_seed=None)
    documents = both(source, rf"{tmp_path}/a\.jsonl, line 2: column 'text': expected text, got a value of type int")
    assert list(documents) == ["one"]


def test_a_zstd_window_too_long_to_read_is_named_with_the_remedy(tmp_path: Path) -> None:
    # One frame of one raw block, whose header asks for a window of 2 GiB.
    content = b'{"text": "one"}\n'
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + (len(content) << 3 | 1).to_bytes(3, "little") + content
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    source = Source(kind="jsonl", files=str(tmp_path / "a.jsonl.zst"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/a\.jsonl\.zst.*window is too long.*zstd -d --long=31"):
        list(Documents(source))


LINES = "one\u2028 \x85 \x0c \x1d\r two\r\n\r\n \t\nthree\nfour\n\n\nfive"
CUTS: dict[str, tuple[Any, list[str]]] = {
    "file": ("file", [LINES]),
    "line": ("line", ["one\u2028 \x85 \x0c \x1d\r two", "three", "four", "five"]),
    "blank_line": ("blank_line", ["one\u2028 \x85 \x0c \x1d\r two", "three\nfour", "five"]),
    "separator": (Separator(separator="r\n\n"), [LINES.replace("\r\n", "\n").split("r\n\n")[0], "five"]),
}


@pytest.mark.parametrize(("split", "expected"), CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("block", [1, 3, 2**20])
def test_a_text_is_cut_into_documents_as_the_source_says(
    split: Any, expected: list[str], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_TABLE_BYTES", block)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(LINES.encode()))
    source = Source(kind="text", files=str(tmp_path / "*"), split=split, shuffle_seed=None, streaming=True)
    assert list(Documents(source)) == expected * 2


PARAGRAPHS = {
    "line": ("line", "one\ntwo\none\ntwo"),
    "blank_line": ("blank_line", "one\nmore\n\ntwo\n\n\none\nmore\n\ntwo\n"),
    "separator line": (Separator(separator="<|end|>"), "one\nmore\n<|end|>\ntwo<|end|>\none\nmore\n<|end|>two\n"),
    "empty lines": (Separator(separator="\n\n"), "one\nmore\n\ntwo\n\none\nmore\n\ntwo\n"),
    "windows separator": (Separator(separator="\r\n--\r\n"), "one\nmore\n--\ntwo\n--\none\nmore\n--\ntwo"),
}


@pytest.mark.parametrize(("split", "content"), PARAGRAPHS.values(), ids=PARAGRAPHS.keys())
@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_paragraph_is_the_same_document_wherever_it_stands_and_however_lines_end(
    split: Any, content: str, block: int, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: documents kept the end of their line but for the last of a file: equal ones were told apart."""
    monkeypatch.setattr(records, "_TABLE_BYTES", block)
    (tmp_path / "a.txt").write_bytes(content.replace("\n", end).encode())
    source = Source(kind="text", files=str(tmp_path / "a.txt"), split=split, shuffle_seed=None, streaming=True)
    documents = list(Documents(source))
    first = "one" if split == "line" else "one\nmore"
    assert documents == [first, "two", first, "two"]


def test_a_bad_document_of_a_text_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\ngood\n")
    source = Source(kind="text", files=str(tmp_path / "a.txt"), split="line", shuffle_seed=None)
    documents = both(source, rf"{tmp_path}/a\.txt, line 2: expected UTF-8")
    assert list(documents) == ["good", "good"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """Regression: files that git-annex had not fetched were left out without a word."""
    (tmp_path / "a.txt").write_text("here")
    (tmp_path / "b.txt").symlink_to("/nowhere/b.txt")
    for files in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(FileNotFoundError, match=r"b\.txt: expected a file, got a link to /nowhere/b\.txt"):
            Documents(Source(kind="text", files=str(files))).count()


def test_a_folder_is_all_files_below_it_where_they_are_of_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "books" / "deep").mkdir(parents=True)
    source = Source(kind="text", files="~/books", shuffle_seed=None)
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*/books'"):
        Documents(source).count()
    for name in ("c 1.5.txt.gz", "deep/b.txt.gz", "a.txt.gz", ".hidden.cfg"):
        (tmp_path / "books" / name).write_bytes(gzip.compress(name.encode()))
    assert list(Documents(source)) == ["a.txt.gz", "c 1.5.txt.gz", "deep/b.txt.gz"]
    assert Documents(Source(kind="text", files="~/books/**/*.txt.gz")).count() == 3, "`~` is the home folder"
    (tmp_path / "books" / "readme.md").write_text("")
    with pytest.raises(FileNotFoundError, match=r"got 3 \.txt\.gz, 1 \.md; give a glob such as") as refused:
        Documents(source).count()
    [glob] = re.findall("such as '(.*)'", str(refused.value))
    assert Documents(Source(kind="text", files=glob)).count() == 3


def test_files_of_another_kind_are_refused_before_they_are_read(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.txt", b"%PDF-1.7\n", "got a PDF; extract its text first"),
        ("a.jsonl.gz", b"", "got JSONL by its name; use `sinkbed prepare --config configs/data/local_jsonl.yaml"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            source_identity(Source(kind="text", files=str(tmp_path / name)))


@pytest.mark.parametrize("split", ["blank_line", Separator(separator="<x>")])
def test_what_ends_a_text_is_no_empty_document(split: Any, tmp_path: Path) -> None:
    ends = "<x>\n" if isinstance(split, Separator) else "\n\n"
    (tmp_path / "a.txt").write_text(f"one{ends}two{ends}")
    source = Source(kind="text", files=str(tmp_path / "a.txt"), split=split, shuffle_seed=None, streaming=True)
    documents = Documents(source)
    assert (list(documents), documents.left_out) == (["one", "two"], {})
