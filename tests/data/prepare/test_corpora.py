"""Each config of a published corpus prepares files of the same layout, columns, format and compression."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import config as datasets_config
from jsonargparse import ArgumentParser

from sinkbed.data.prepare.config import PrepareConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.store.token_store import TokenStore
from tests.support import ROOT
from tests.support.stores import split_of

CONFIGS = ROOT / "configs" / "data"
TEXTS = [f"Page {i} of the corpus, été, with <bos> and some {i * i} words to read.\n" * (1 + i % 3) for i in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
        patch.setattr(os, "fsync", lambda _: None)
        yield


def card(folder: Path, name: str, **files: str) -> None:
    """The part of a data set's card that says which files belong to which split of a configuration."""
    splits = [{"split": split, "path": path} for split, path in files.items()]
    header = yaml.safe_dump({"configs": [{"config_name": name, "data_files": splits}]})
    (folder / "README.md").write_text(f"---\n{header}---\n")


def parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else pa.compress(content, "zstd", asbytes=True))


def fineweb_edu(folder: Path) -> None:
    count = len(TEXTS) // 2
    for part in range(2):
        texts = TEXTS[part * count : (part + 1) * count]
        ids = [f"<urn:uuid:{i}>" for i in range(count)]
        columns: dict[str, list[Any]] = {"text": texts, "id": ids, "dump": ["CC-MAIN-2013-20"] * count}
        columns |= {"url": ["http://a"] * count, "file_path": ["s3://a"] * count, "language": ["en"] * count}
        columns |= {"language_score": [0.9] * count, "token_count": [5] * count, "score": [3.1] * count}
        parquet(folder / "sample" / "10BT" / f"00{part}_00000.parquet", **columns, int_score=[3] * count)
    parquet(folder / "data" / "CC-MAIN-2013-20" / "train-00000.parquet", text=["another configuration"])
    card(folder, "sample-10BT", train="sample/10BT/*")


def slimpajama(folder: Path) -> None:
    sets = ("RedPajamaCommonCrawl", "RedPajamaGithub")
    records = [{"text": text, "meta": {"redpajama_set_name": sets[i % 2]}} for i, text in enumerate(TEXTS)]
    lines(folder / "train" / "chunk1" / "example_train_0.jsonl.zst", records[:30])
    lines(folder / "train" / "chunk2" / "example_train_0.jsonl.zst", records[30:])
    lines(folder / "validation" / "chunk1" / "example_holdout_0.jsonl.zst", [{"text": "held out", "meta": {}}])


def pile(folder: Path) -> None:
    records = [{"text": text, "meta": {"pile_set_name": f"Part {i % 5}"}} for i, text in enumerate(TEXTS)]
    # Nested columns that differ between files, and a record that repeats.
    lines(folder / "train" / "00.jsonl.zst", [*records[:30], records[0]])
    lines(folder / "train" / "01.jsonl.zst", [{**record, "meta": {"a": [1]}} for record in records[30:]])
    lines(folder / "val.jsonl.zst", [{"text": "held out", "meta": {"pile_set_name": "Github"}}])
    lines(folder / "test.jsonl.zst", [{"text": "held out too", "meta": {"pile_set_name": "Github"}}])


def c4(folder: Path) -> None:
    records = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a"} for text in TEXTS]
    lines(folder / "en" / "c4-train.00000-of-01024.json.gz", records[:30])
    lines(folder / "en" / "c4-train.00001-of-01024.json.gz", records[30:])
    lines(folder / "en" / "c4-validation.00000-of-00008.json.gz", [{"text": "held out", "timestamp": "", "url": ""}])
    card(folder, "en", train="en/c4-train.*.json.gz", validation="en/c4-validation.*.json.gz")


def tinystories(folder: Path) -> None:
    parquet(folder / "data" / "train-00000-of-00004-2d5a1467fff1081b.parquet", text=[*TEXTS, TEXTS[3]])
    parquet(folder / "data" / "validation-00000-of-00001-869c898b519ad725.parquet", text=["held out"])


def wikitext(folder: Path) -> None:
    text = ["", " = Title = \n", ""]
    for paragraph in TEXTS:
        text += [paragraph, ""]
    parquet(folder / "wikitext-103-raw-v1" / "train-00000-of-00002.parquet", text=text[:50])
    parquet(folder / "wikitext-103-raw-v1" / "train-00001-of-00002.parquet", text=text[50:])
    parquet(folder / "wikitext-103-raw-v1" / "test-00000-of-00001.parquet", text=["held out"])
    card(folder, "wikitext-103-raw-v1", train="wikitext-103-raw-v1/train-*", test="wikitext-103-raw-v1/test-*")


def openwebtext(folder: Path) -> None:
    parquet(folder / "plain_text" / "train-00000-of-00080.parquet", text=TEXTS[:30])
    parquet(folder / "plain_text" / "train-00001-of-00080.parquet", text=TEXTS[30:])
    card(folder, "plain_text", train="plain_text/train-*")


CORPORA: dict[str, tuple[Callable[[Path], None], dict[str, int]]] = {
    "fineweb-edu": (fineweb_edu, {}),
    "slimpajama": (slimpajama, {}),
    "pile": (pile, {"duplicate": 1}),
    "c4": (c4, {}),
    "tinystories": (tinystories, {"duplicate": 1}),
    "wikitext-103": (wikitext, {"empty": 62, "too_short": 1}),
    "openwebtext": (openwebtext, {}),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_published_corpus_is_prepared_from_files_laid_out_like_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left_out = CORPORA[name]
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    fields["source"]["name"], fields["out"] = str(tmp_path / "corpus"), str(tmp_path / "store")
    # Sixty documents: the published shares would hold out none of them.
    fields["validation_share"] = 0.1
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PrepareConfig)
    config = PrepareConfig(**parser.instantiate_classes(parser.parse_object(fields)))
    manifest = prepare(config, progress=False, workers=1)
    found = []
    for split in ("train", "validation"):
        store = TokenStore.open(config.out, split)
        tokenizer = store.tokenizer()
        texts = [tokenizer.decode(store.slice(i)) for i in range(store.documents)]
        assert all(split_of(text, 0.1) == split for text in texts)
        found += texts
    assert sorted(found) == sorted(TEXTS) and manifest.left_out == left_out


def test_every_config_of_a_published_corpus_is_tested_here() -> None:
    others = {"demo", "local_jsonl", "local_parquet", "local_text", "mixture"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {*CORPORA, *others}
    for name in CORPORA:
        assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["source"]["kind"] == "hub"
