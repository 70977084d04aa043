"""Preparing goes from documents to a token store, once; again it is up to date or refuses to mix."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import yaml
from datasets import config as datasets_config
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from tokenizers import normalizers

from sinkbed.data.pack.batches import Rows
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import make_tokenizer, prepare
from sinkbed.data.source import selection
from sinkbed.data.source.config import SingleSource, Source
from sinkbed.data.store.manifest import Manifest
from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from tests.support import ROOT
from tests.support.stores import split_of

TEXTS = [f"été number {i} is a document with <bos> and words {i * i}" for i in range(300)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(os, "fsync", lambda _: None)  # what flushing is for is tested in test_staging
        yield


def write_corpus(folder: Path, texts: list[str], name: str = "corpus.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(
        source=Source(kind="jsonl", files=(str(write_corpus(tmp_path, [*TEXTS, " "])),)),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation_share=0.2,
        shard_bytes=2000,
        out=str(tmp_path / "stores" / "corpus"),
    )


def loaded(config: PrepareConfig) -> TokenizerConfig:
    path = Path(config.out).parents[1] / "t.json"
    Tokenizer.train(TEXTS, vocab_size=270).save(path)
    return TokenizerConfig(path=str(path))


def repeating() -> Source:
    part = SingleSource(kind="demo")
    return Source(kind="mixture", sources=(part, part), weights=(1, 1), stopping_strategy="all_exhausted")


def documents_in(out: str, split: str) -> list[str]:
    store = TokenStore.open(out, split)
    tokenizer = store.tokenizer()
    return [tokenizer.decode(store.slice(i)) for i in range(store.documents)]


def test_every_document_comes_back_from_exactly_one_split(config: PrepareConfig) -> None:
    manifest = prepare(config, progress=False)
    train, validation = (documents_in(config.out, split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(TEXTS)
    assert 30 < len(validation) < 90
    assert manifest.left_out == {"empty": 1}
    assert len(manifest.splits["train"].shards) > 3
    for split, texts in (("train", train), ("validation", validation)):
        store = TokenStore.open(config.out, split)
        store.verify()
        shards = [pa.ipc.open_file(str(store.path / shard.file)).read_all() for shard in store.info.shards]
        sizes = [size for shard in shards for size in shard.column("bytes").to_pylist()]
        assert sizes == [len(text.encode()) for text in texts]
        assert store.info.bytes == sum(len(text.encode()) for text in texts)
        assert (
            store.tokenizer().token_bytes[store.gather(np.array([0]), np.array([store.tokens]))].sum()
            == store.info.bytes
        )


def test_the_split_depends_on_each_text_alone(config: PrepareConfig, tmp_path: Path) -> None:
    prepare(config, progress=False)
    mixed = [*TEXTS, *(f"new {i}" for i in range(100)), TEXTS[0]]
    random.Random(0).shuffle(mixed)
    source = Source(kind="jsonl", files=(str(write_corpus(tmp_path, mixed, "mixed.jsonl")),))
    other = dataclasses.replace(config, source=source, out=str(tmp_path / "mixed"))
    prepare(other, progress=False)
    held = documents_in(config.out, "validation")
    assert set(held) == set(documents_in(other.out, "validation")) & set(TEXTS)
    # A larger share keeps what a smaller one held out.
    assert set(held) <= {text for text in TEXTS if split_of(text, 0.5) == "validation"}


def test_the_tokenizer_sees_no_validation_document_and_no_more_than_its_limit(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = Tokenizer.train.__func__  # type: ignore[attr-defined]

    def spy(cls: type[Tokenizer], texts: Any, *, vocab_size: int) -> Tokenizer:
        seen[:] = list(texts)
        return train(cls, seen, vocab_size=vocab_size)

    monkeypatch.setattr(Tokenizer, "train", classmethod(spy))
    limits: list[tuple[dict[str, Any], int | None]] = [
        ({}, None),
        ({"train_documents": 7}, 7),
        ({"train_bytes": 500}, None),
    ]
    for limit, count in limits:
        chosen = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=300, **limit))
        prepare(chosen, force=True, progress=False)
        order = documents_in(config.out, "train")
        assert seen == order[: len(seen)]
        assert len(seen) == count or count is None
        if "train_bytes" in limit:
            sizes = [len(text.encode()) for text in seen]
            assert sum(sizes[:-1]) < 500 <= sum(sizes)
        elif not limit:
            assert len(seen) == len(order)


def test_the_store_is_the_same_to_the_byte_for_any_number_of_workers(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_BATCH_DOCUMENTS", 16)
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / f"by{workers}"
        manifest = prepare(dataclasses.replace(config, out=str(out)), progress=False, workers=workers)
        assert sum(len(split.shards) for split in manifest.splits.values()) > 6
        found.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert found[0] == found[1] == found[2]


def test_a_tokenizer_reads_no_more_than_its_limit_of_one_document(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Tokenizer, "train", lambda texts, vocab_size: seen.extend(texts))
    long = "\u20ac" * 1000
    for limit, expected in ((100, "\u20ac" * 33), (3000, long), (2999, "\u20ac" * 999)):
        seen.clear()
        chosen = dataclasses.replace(
            config, tokenizer=TokenizerConfig(vocab_size=300, train_bytes=limit), validation_share=0.0
        )
        make_tokenizer(chosen, [long, "next"], progress=False)  # type: ignore[arg-type]
        assert seen == [expected]


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), min_size=1, max_size=30),
    deduplicate=st.booleans(),
    min_bytes=st.sampled_from([None, 4]),
    shard_bytes=st.integers(1, 80),
    shuffle_seed=st.sampled_from([None, 3]),
)
def test_what_a_store_and_its_count_of_left_out_hold_is_the_corpus(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    deduplicate: bool,
    min_bytes: int | None,
    shard_bytes: int,
    shuffle_seed: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    texts = [*texts, "always a document"]
    source = Source(
        kind="jsonl", files=str(write_corpus(folder, [*texts, "\ud800"])), streaming=True, shuffle_seed=shuffle_seed
    )
    share = 0.4 if any(split_of(t, 0.4) == "validation" and len(t) > 4 and t.strip() for t in texts) else 0.0
    chosen = PrepareConfig(
        source=source,
        tokenizer=TokenizerConfig(vocab_size=258),
        validation_share=share,
        deduplicate=deduplicate,
        min_bytes=min_bytes,
        on_error="skip",
        shard_bytes=shard_bytes,
        out=str(folder / "store"),
    )
    try:
        manifest = prepare(chosen, progress=False, workers=1)
    except ValueError as error:
        assert "and 0 validation" in str(error) or " 0 training" in str(error)
        return
    kept = [text for text in texts if text.strip() and len(text.encode()) >= (min_bytes or 0)]
    kept = list(dict.fromkeys(kept)) if deduplicate else kept
    splits = {split: documents_in(chosen.out, split) for split in manifest.splits}
    assert sorted(chain(*splits.values())) == sorted(kept)
    assert all(split_of(text, share) == split for split, found in splits.items() for text in found)
    assert len(kept) + sum(manifest.left_out.values()) == len(texts) + 1
    assert manifest.left_out["encoding"] == 1


def test_every_reason_for_leaving_out_is_counted_in_the_manifest(config: PrepareConfig, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with path.open("a") as file:
        file.write("\n" + "\n".join(['{"text": "tiny"}', json.dumps({"text": TEXTS[3]}), "{", '{"text": 3}', "{}"]))
        file.write("\n" + json.dumps({"text": "long " * 90}))
    strict = dataclasses.replace(config, min_bytes=5, max_bytes=200, deduplicate=True)
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 30[4-6]: expected"):
        prepare(strict, progress=False)
    assert list(Path(config.out).parent.iterdir()) == [], "nothing of it is of use to another config"
    manifest = prepare(dataclasses.replace(strict, on_error="skip"), progress=False)
    assert manifest.left_out == {
        "duplicate": 1,
        "empty": 1,
        "malformed": 1,
        "missing_column": 1,
        "not_text": 1,
        "too_long": 1,
        "too_short": 1,
    }
    assert sum(split.documents for split in manifest.splits.values()) == len(TEXTS)


def test_a_tokenizer_of_a_folder_and_its_normaliser_decide_what_is_stored(
    config: PrepareConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    backend = Tokenizer.train(TEXTS, vocab_size=300).backend
    backend.normalizer = normalizers.NFC()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<eos>", "eos_token": "<eos>"}))
    decomposed = ["e\u0301" + text for text in TEXTS]
    source = Source(kind="jsonl", files=str(write_corpus(tmp_path, decomposed, "nfd.jsonl")))
    chosen = dataclasses.replace(config, source=source, tokenizer=TokenizerConfig(path=str(folder)))
    manifest = prepare(chosen, progress=False)
    assert manifest.bos_id == manifest.eos_id == 1 and manifest.recipe["tokenizer"]["bos"] == "<eos>"
    found = [text for split in manifest.splits for text in documents_in(chosen.out, split)]
    assert sorted(found) == sorted(unicodedata.normalize("NFC", text) for text in decomposed)
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(text.encode()) for text in found)
    named = TokenizerConfig(path=str(folder), bos="<eos>", eos="<eos>")
    assert prepare(dataclasses.replace(chosen, tokenizer=named), progress=False) == manifest


def test_the_same_config_gives_the_same_store_wherever_it_stands(config: PrepareConfig, tmp_path: Path) -> None:
    manifest = prepare(config, progress=False)
    assert prepare(dataclasses.replace(config, out=str(tmp_path / "again")), progress=False) == manifest


def test_a_complete_store_of_the_same_config_is_left_alone(
    config: PrepareConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepare(config, progress=False)
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("read the corpus again"))
    capsys.readouterr()
    assert prepare(config) == manifest
    assert capsys.readouterr().out == "", "what was found is for the command to say"
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before


def test_defaults_written_out_are_the_same_config(config: PrepareConfig) -> None:
    implicit = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=300))
    explicit = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=300, train_bytes=4_000_000))
    assert prepare(implicit, progress=False) == prepare(explicit, progress=False)


def test_a_store_of_another_config_is_refused_with_what_differs(config: PrepareConfig) -> None:
    manifest = prepare(config, progress=False)
    other = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=280), validation_share=0.1)
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size: expected 280, got 300.*--force") as refused:
        prepare(other, progress=False)
    assert "validation_share: expected 0.1, got 0.2" in str(refused.value)
    assert TokenStore.open(config.out).manifest == manifest
    assert prepare(other, force=True, progress=False).vocab_size == 280


def test_a_changed_source_file_or_tokenizer_file_is_noticed(config: PrepareConfig, tmp_path: Path) -> None:
    Tokenizer.train(TEXTS, vocab_size=270).save(tmp_path / "t.json")
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(path=str(tmp_path / "t.json")))
    assert prepare(config, progress=False).vocab_size == 270
    Tokenizer.train(TEXTS, vocab_size=271).save(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"tokenizer\.sha256: expected"):
        prepare(config, progress=False)
    Tokenizer.train(TEXTS, vocab_size=270).save(tmp_path / "t.json")
    prepare(config, progress=False)
    write_corpus(tmp_path, TEXTS[:-1])
    with pytest.raises(ValueError, match=r"identity\.files\.size: expected"):
        prepare(config, progress=False)


def test_the_manifest_does_not_grow_with_the_files(config: PrepareConfig, tmp_path: Path) -> None:
    sizes = []
    for count in (2, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        for part in range(count):
            write_corpus(folder, TEXTS[part::count], f"{part:02d}.jsonl")
        chosen = dataclasses.replace(
            config, source=Source(kind="jsonl", files=f"{folder}/*"), out=str(folder / "s"), shard_bytes=None
        )
        prepare(chosen, progress=False, workers=1)
        sizes.append((folder / "s" / "manifest.json").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 20
    (folder / "00.jsonl").unlink()
    with pytest.raises(ValueError, match=r"identity\.files\.count: expected 39, got 40"):
        prepare(chosen, progress=False)


def test_a_home_folder_is_meant_by_a_tilde_in_every_path(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded(config)
    chosen = dataclasses.replace(
        config,
        source=Source(kind="jsonl", files="~/corpus.jsonl"),
        tokenizer=TokenizerConfig(path="~/t.json"),
        out="~/made/store",
    )
    manifest = prepare(chosen, progress=False, workers=1)
    assert TokenStore.open("~/made/store").manifest == Manifest.read(Path("~/made/store")) == manifest
    assert (tmp_path / "made" / "store").is_dir() and not Path("~").exists()
    assert Source(kind="hub", name="~/folder").name == str(tmp_path / "folder")


def test_files_are_for_whom_the_umask_says(config: PrepareConfig) -> None:
    before = os.umask(0o027)
    try:
        prepare(config, progress=False, workers=1)
        Rows(TokenStore.open(config.out), Strategy(packing="best_fit"), context_length=16)
    finally:
        os.umask(before)
    paths = [path for path in Path(config.out).rglob("*")]
    assert len({path.suffix for path in paths}) == 3 and any(path.parent.parent.name == "packing" for path in paths)
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o750}


def test_a_copy_in_a_cache_is_told_of_once_and_foreign_bars_are_off(
    config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config, progress=False, workers=1)
    told = capsys.readouterr().err
    [line] = told.splitlines()
    [folder] = re.findall(r"copying .*corpus\.jsonl to (\S+), where `datasets` keeps it", line)
    assert list(Path(folder).glob("*.arrow"))
    prepare(dataclasses.replace(config, out=str(tmp_path / "again")), progress=False, workers=1)
    source = dataclasses.replace(config.source, streaming=True)
    prepare(dataclasses.replace(config, source=source, out=str(tmp_path / "streamed")), progress=False, workers=1)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_an_ascii_locale_gives_the_same_store(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "été").mkdir()
    source = Source(kind="jsonl", files=str(write_corpus(tmp_path / "été", TEXTS, "ü.jsonl")), streaming=True)
    here = prepare(dataclasses.replace(config, source=source, out=str(tmp_path / "ö")), progress=False, workers=1)
    script = """
import sys
from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.source.config import Source
assert sys.getfilesystemencoding() == "ascii"
source = Source(kind="jsonl", files=sys.argv[1], streaming=True)
prepare(PrepareConfig(source=source, tokenizer=TokenizerConfig(vocab_size=300), validation_share=0.2,
                      shard_bytes=2000, out=sys.argv[2]), workers=1)
"""
    there = str(tmp_path / "ü")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", script, str(source.files), there]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr.decode()
    assert Manifest.read(Path(there)) == here


def test_a_damaged_store_is_not_up_to_date(config: PrepareConfig) -> None:
    prepare(config, progress=False)
    shard = Path(config.out) / "validation" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"validation/00000\.arrow is damaged.*--force"):
        prepare(config, progress=False)
    prepare(config, force=True, progress=False)
    TokenStore.open(config.out, "validation").verify()


def test_a_share_that_leaves_a_split_empty_is_refused_and_leaves_nothing(config: PrepareConfig) -> None:
    with pytest.raises(ValueError, match=r"validation_share: expected a share.* got 1e-09.*and 0 validation documents"):
        prepare(dataclasses.replace(config, validation_share=1e-9), progress=False)
    with pytest.raises(
        ValueError,
        match=r"source: expected documents that the config lets pass, got none \(left out: .*300 too_short\)",
    ):
        prepare(dataclasses.replace(config, min_bytes=10_000, tokenizer=loaded(config)), progress=False)
    assert list(Path(config.out).parent.iterdir()) == []
    manifest = prepare(dataclasses.replace(config, validation_share=0.0), progress=False)
    assert list(manifest.splits) == ["train"] and manifest.splits["train"].documents == 300


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TokenizerConfig(path="t.json", vocab_size=300),
            "tokenizer.vocab_size: expected none with a tokenizer that is loaded",
        ),
        (lambda: TokenizerConfig(bos="<s>"), "tokenizer.bos: expected none with a tokenizer that is trained"),
        (lambda: TokenizerConfig(train_bytes=0), "tokenizer.train_bytes: expected at least 1, got 0"),
        (
            lambda: PrepareConfig(source=Source(kind="demo"), min_bytes=1, out="x"),
            "min_bytes: expected at least 2, got 1",
        ),
        (
            lambda: PrepareConfig(source=Source(kind="demo"), max_bytes=0, out="x"),
            "max_bytes: expected at least 1, got 0",
        ),
        (
            lambda: PrepareConfig(source=Source(kind="demo"), min_bytes=9, max_bytes=8, out="x"),
            "max_bytes: expected at least 9, got 8",
        ),
        (
            lambda: PrepareConfig(source=Source(kind="demo"), on_error="stop", out="x"),
            "on_error: expected one of refuse, skip, got 'stop'",
        ),  # type: ignore[arg-type]
        (
            lambda: PrepareConfig(source=repeating(), deduplicate=True, out="x"),
            "deduplicate: expected false with source.stopping_strategy all_exhausted",
        ),
        (
            lambda: PrepareConfig(source=Source(kind="demo"), validation_share=1.0, out="x"),
            "validation_share: expected .*, got 1.0",
        ),
        (
            lambda: PrepareConfig(source=Source(kind="demo"), shard_bytes=0, out="x"),
            "shard_bytes: expected at least 1, got 0",
        ),
    ],
)
def test_settings_outside_their_range_or_without_effect_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_importing_the_config_loads_no_heavy_library() -> None:
    heavy = ("torch", "datasets", "tokenizers", "pyarrow", "pandas")
    script = "import sys, sinkbed.data.prepare.prepare, sinkbed.data.pack.strategy; "
    script += f"print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_checkout_is_valid(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PrepareConfig)
    built = PrepareConfig(**parser.instantiate_classes(parser.parse_object(yaml.safe_load(path.read_text()))))
    assert isinstance(built.source, Source) and built.out.startswith("stores/")


def test_the_configs_include_those_the_guide_names() -> None:
    assert {"demo", "fineweb-edu", "mixture", "local_jsonl"} <= {
        path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")
    }
