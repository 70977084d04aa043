"""An estimate is exact where the sample is the corpus, near it where it is not, and writes nothing."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config

from data.estimate import estimate
from data.prepare import PrepareConfig, TokenizerConfig, prepare
from data.sources import SingleSource, Source
from data.units import Units

GENERATOR = random.Random(0)
TEXTS = [f"number {i} " + "word " * GENERATOR.randrange(5, 60) for i in range(3000)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
        patch.setattr(os, "fsync", lambda _: None)
        yield


def write(folder: Path, kind: str) -> Source:
    for part in range(10):
        texts = TEXTS[part * 300 : part * 300 + 300]
        content = "\n".join(json.dumps({"text": text}) for text in texts).encode()
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), folder / f"{part}.parquet")
        elif kind == "jsonl.gz":
            (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(content))
        elif kind == "jsonl":
            (folder / f"{part}.jsonl").write_bytes(content)
        else:
            for i, text in enumerate(texts[:40]):
                (folder / f"{part}-{i:03d}.txt").write_text(text)
    return Source(kind=kind.split(".")[0], files=str(folder / f"*.{kind.replace('text', 'txt')}"))  # type: ignore[arg-type]


def config_of(folder: Path, source: Source) -> PrepareConfig:
    return PrepareConfig(
        source=source, tokenizer=TokenizerConfig(vocab_size=280), shard_bytes=50_000, out=str(folder / "s" / "store")
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "text"])
def test_a_sample_of_all_is_exact_and_a_part_of_it_is_near(kind: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, write(tmp_path, kind))
    whole, part = estimate(config, workers=1), estimate(config, workers=1, sample_bytes=30_000)
    assert not (tmp_path / "s").exists() and not list(datasets_config.HF_DATASETS_CACHE.rglob("*.arrow"))
    manifest = prepare(config, progress=False, workers=1)
    documents, size, tokens = (
        sum(getattr(split, name) for split in manifest.splits.values()) for name in ("documents", "bytes", "tokens")
    )
    # The tokenizer of the estimate saw the validation documents' side by the same rule, so it is the same.
    assert (whole.documents, whole.bytes, whole.tokens, whole.known) == (documents, size, tokens, True)
    disk = sum(path.stat().st_size for path in Path(config.out).rglob("*.arrow"))
    assert whole.disk == pytest.approx(disk, rel=0.2)
    # Compressed files of this size are read whole: little less would be read ahead.
    assert part.sample_bytes < size / 1.9 and part.known == (kind in ("parquet", "text"))
    assert part.documents == pytest.approx(documents, rel=0.0 if part.known else 0.2)
    assert part.bytes == pytest.approx(size, rel=0.2) and part.tokens == pytest.approx(tokens, rel=0.3)
    assert part.bytes and part.seconds == pytest.approx(part.bytes / part.rate)
    assert whole.trained_on_sample is False and part.trained_on_sample


def test_what_a_stopped_run_finished_is_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, write(tmp_path, "jsonl"))
    real = Units.finish

    def finish(self: Units, number: int, gathered: object) -> None:
        if number == 4:
            raise KeyboardInterrupt
        real(self, number, gathered)  # type: ignore[arg-type]

    monkeypatch.setattr(Units, "finish", finish)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=False, workers=1)
    found = estimate(config, workers=1)
    assert 180_000 < found.finished_bytes <= 200_000 and found.bytes is not None
    assert found.seconds == pytest.approx((found.bytes - found.finished_bytes) / found.rate)
    assert estimate(dataclasses.replace(config, min_bytes=2), workers=1).finished_bytes == 0


def test_a_mixture_is_sampled_but_not_added_up(tmp_path: Path) -> None:
    files = str(tmp_path / "*.jsonl")
    write(tmp_path, "jsonl")
    part = SingleSource(kind="jsonl", files=files, streaming=True)
    source = Source(kind="mixture", sources=(part, part), weights=(1, 2))
    found = estimate(config_of(tmp_path, source), workers=1, sample_bytes=20_000)
    assert (found.documents, found.tokens, found.seconds) == (None, None, None) and found.sample_documents > 50


def test_bad_records_of_the_sample_are_refused_or_counted(tmp_path: Path) -> None:
    write(tmp_path, "jsonl")
    (tmp_path / "0.jsonl").write_text('{"text": "a"}\n{\n')
    config = config_of(tmp_path, Source(kind="jsonl", files=str(tmp_path / "*.jsonl")))
    with pytest.raises(ValueError, match=r"0\.jsonl, line 2"):
        estimate(config, workers=1)
    assert estimate(dataclasses.replace(config, on_error="skip"), workers=1).left_out == {"malformed": 1}
