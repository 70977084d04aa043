"""An estimate is exact where the sample is the corpus, near it where it is not, and writes nothing."""

import dataclasses
import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config

from sinkbed.data.prepare import sampling
from sinkbed.data.prepare.chunks import Chunks
from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.estimate import estimate
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.source.config import Separator, SingleSource, Source

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
    if kind == "jsonl.gz":  # of compressed files this small all is read
        assert dataclasses.replace(part, rate=whole.rate, seconds=whole.seconds) == whole
        return
    assert part.sample_bytes < size / 1.9 and part.known == (kind in ("parquet", "text"))
    assert part.documents == pytest.approx(documents, rel=0.0 if part.known else 0.2)
    assert part.bytes == pytest.approx(size, rel=0.1) and part.tokens == pytest.approx(tokens, rel=0.2)
    assert part.bytes and part.seconds == pytest.approx(part.bytes / part.rate)
    assert whole.trained_on_sample is False and part.trained_on_sample
    assert whole.spread == 0 and part.spread is not None and 0 < part.spread < 0.2


def mixed_texts() -> list[list[str]]:
    """Documents of 120 files, in three scripts, of lengths and numbers that differ by orders of magnitude."""
    generator = random.Random(3)

    def text(letters: str) -> str:
        words = ["".join(generator.choices(letters, k=generator.randrange(1, 9))) for _ in range(60)]
        return " ".join(generator.choices(words, k=int(generator.lognormvariate(3.0, 0.8)) + 1))

    scripts = ("abcdefgh", "\u0430\u0431\u0432\u0433\u0434\u0435", "\u4e00\u4e8c\u4e09\u56db")
    counts = [int(generator.lognormvariate(1.8, 1.2)) + 1 for _ in range(120)]
    return [[text(scripts[number // 40]) for _ in range(count)] for number, count in enumerate(counts)]


@pytest.mark.parametrize("kind", ["jsonl", "text", "line", "separator", "parquet", "jsonl.gz", "jsonl.zst", "both"])
def test_files_of_very_different_sizes_and_languages_are_estimated_within_a_tenth(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: as many documents were counted in each file, and the first files stood for the others."""
    monkeypatch.setattr(sampling, "_COMPRESSED_BYTES", 2**14)
    for number, texts in enumerate(mixed_texts()):
        path = tmp_path / f"{number:03d}.{kind}"
        lines = [json.dumps({"text": text, "id": "x" * (number % 50)}, ensure_ascii=number % 2 == 0) for text in texts]
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), path, row_group_size=50)
        elif kind == "jsonl.zst":
            path.write_bytes(pa.compress("\n".join(lines).encode(), "zstd", asbytes=True))
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
        elif kind == "jsonl" or (kind == "both" and number % 2):
            path.with_suffix(".jsonl").write_text("\n".join(lines))
        else:
            path.with_suffix(".txt").write_text("\n" * (kind == "line") + "\n".join(texts))
    texts_there = {
        "split": {"line": "line", "separator": Separator(separator="\n")}.get(kind),
        "files": str(tmp_path / "*.txt"),
    }
    source = Source(kind="jsonl", files=f"{tmp_path}/*", column="text")
    if kind == "parquet":
        source = Source(kind="parquet", files=f"{tmp_path}/*")
    elif kind in ("text", "line", "separator"):
        source = Source(kind="text", **texts_there)
    elif kind == "both":
        lines_there = SingleSource(kind="jsonl", files=f"{tmp_path}/*.jsonl")
        source = Source(
            kind="mixture",
            sources=(lines_there, SingleSource(kind="text", **texts_there)),
            weights=(1, 1),
            stopping_strategy="all_exhausted_without_replacement",
        )
    config = dataclasses.replace(
        config_of(tmp_path, source), tokenizer=TokenizerConfig(vocab_size=400), shard_bytes=None
    )
    found = estimate(config, workers=1, sample_bytes=100_000)
    manifest = prepare(config, progress=False, workers=1)
    size, tokens = (sum(getattr(split, name) for split in manifest.splits.values()) for name in ("bytes", "tokens"))
    assert found.sample_bytes < size * 0.7, "the sample must be a part"
    assert found.spread is not None and found.tokens is not None
    assert found.bytes == pytest.approx(size, rel=0.1) and found.tokens == pytest.approx(tokens, rel=0.1)
    assert abs(found.tokens - tokens) < found.tokens * found.spread * 1.5


def test_documents_of_a_folder_of_thousands_of_mixed_files_are_counted_within_a_tenth(tmp_path: Path) -> None:
    """Regression: long records were likelier to be met than short ones, and a piece of a file counted as a document."""
    for seed in range(2):
        generator = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        lines = 0
        for number in range(2):
            (folder / f"big-{number}.txt").write_text("word " * 200_000)
        for number in range(800):
            (folder / f"small-{number:04d}.txt").write_text("word " * int(generator.lognormvariate(3, 1) + 1))
        for number in range(200):
            mean = generator.choice((1, 2, 4, 5))
            counts = [int(generator.lognormvariate(mean, 1)) for _ in range(int(generator.lognormvariate(3, 1.3)) + 1)]
            lines += len(counts)
            (folder / f"{number:03d}.jsonl").write_text(
                "".join(json.dumps({"text": "word " * (n + 1)}) + "\n" for n in counts)
            )
        source = Source(
            kind="mixture",
            sources=(
                SingleSource(kind="jsonl", files=f"{folder}/*.jsonl"),
                SingleSource(kind="text", files=f"{folder}/*.txt"),
            ),
            weights=(1, 1),
            stopping_strategy="all_exhausted_without_replacement",
        )
        found = estimate(config_of(tmp_path, source), workers=1, sample_bytes=500_000)
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert found.sample_bytes < size / 2, "the sample must be a part"
        assert found.documents == pytest.approx(lines + 802, rel=0.1)


def test_a_json_array_longer_than_a_stretch_is_sampled_whole(tmp_path: Path) -> None:
    """Regression: a stretch that began inside an array found no record there and refused the file."""
    for name in "ab":
        records = [{"text": f"{name} {i} with a few words"} for i in range(2_000)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records, indent=1))
    config = config_of(tmp_path, Source(kind="jsonl", files=str(tmp_path / "*.json")))
    assert estimate(config, workers=1, sample_bytes=20_000).documents == 4_000


def test_a_text_without_its_separator_is_sampled_all_the_same(tmp_path: Path) -> None:
    """Regression: the rest of the file was passed over, in search of the next document."""
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text("word " * 20_000)
    source = Source(kind="text", files=str(tmp_path / "*.txt"), split=Separator(separator="<|end|>"))
    found = estimate(config_of(tmp_path, source), workers=1, sample_bytes=300_000)
    assert found.bytes == pytest.approx(2_000_000, rel=0.01) and found.documents == pytest.approx(20, rel=0.5)


def test_what_a_stopped_run_finished_is_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, write(tmp_path, "jsonl"))
    real = Chunks.finish

    def finish(self: Chunks, number: int, gathered: object) -> None:
        if number == 4:
            raise KeyboardInterrupt
        real(self, number, gathered)  # type: ignore[arg-type]

    monkeypatch.setattr(Chunks, "finish", finish)
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


def test_a_dry_run_reads_no_more_than_its_sample_and_passes_over_a_damaged_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkbed.data import files
    from sinkbed.data.prepare.chunks import CHUNKS_NAME, RECIPE_NAME
    from sinkbed.data.prepare.recipe import recipe_of
    from sinkbed.data.prepare.staging import partial_of

    config = config_of(tmp_path, dataclasses.replace(write(tmp_path, "jsonl"), shuffle_seed=None))
    with monkeypatch.context() as patch:
        for module in ("data.source.loading", "data.prepare.recipe"):
            patch.setattr(f"sinkbed.{module}.sha256_file", lambda path: pytest.fail(f"{path} is read whole"))
        assert estimate(config, sample_bytes=3_000).finished_bytes == 0
    (partial_of(config.out) / CHUNKS_NAME).mkdir(parents=True)
    files.write_json(partial_of(config.out) / RECIPE_NAME, recipe_of(config))
    (partial_of(config.out) / CHUNKS_NAME / "00000.json").write_text("{}")
    assert estimate(config, sample_bytes=3_000).finished_bytes == 0


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [(range(5_000), pa.int64(), "values of type int64"), ([b"\xff" * 40] * 900, pa.string(), "expected UTF-8")],
)
def test_a_sample_of_parquet_that_holds_no_text_is_named(values: Any, kind: Any, message: str, tmp_path: Path) -> None:
    raw = pa.array(values, pa.binary() if kind == pa.string() else kind)
    column = pa.Array.from_buffers(kind, len(raw), raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=300)
    config = config_of(tmp_path, Source(kind="parquet", files=str(tmp_path / "a.parquet")))
    with pytest.raises(ValueError, match=rf"a\.parquet.*{message}"):
        estimate(config, sample_bytes=1_000)
