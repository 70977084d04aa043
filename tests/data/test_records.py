"""Records are read one by one, whatever the compression, and a bad one is named, or left out and counted."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config

from data.records import Record, read_records
from data.sources import Documents, Source

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
    b'{"text": ': ("malformed", "line 2: found no JSON"),
    b"[1, 2]": ("malformed", "line 2: found a JSON list, expected an object"),
    b'"text"': ("malformed", "line 2: found a JSON str"),
    b"[" * 100_000: ("malformed", "line 2: found no JSON"),
    b'{"text": "\xff\xfe"}': ("encoding", "line 2: found bytes that are no UTF-8"),
    b'{"text": "half \\ud800"}': ("encoding", "line 2: found text that UTF-8 cannot hold"),
    b'{"body": "a", "n": 1}': ("missing_column", r"line 2: found columns 'body', 'n', expected 'text'.*source\.column"),
    b"{}": ("missing_column", "line 2: found columns none"),
    b'{"text": 5}': ("not_text", "line 2: column 'text': found a value of type int"),
    b'{"text": ["a"]}': ("not_text", "found a value of type list"),
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
    with pytest.raises(ValueError, match=r"a\.txt: found bytes that are no UTF-8"):
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
    lines = [json.dumps({"text": f"{i} {i * i}"}) for i in range(20_000)]
    content = bytearray(gzip.compress("\n".join(lines).encode(), mtime=0))
    path = tmp_path / "corpus.jsonl.gz"
    problems = set()
    for place in range(2000, len(content) - 600, 4000):
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
